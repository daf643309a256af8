"""Builds the tiny Janus of the shapes world: transformers' own classes, a small configuration, its own processor.

Everything is saved in transformers' layout, so that ``JanusForConditionalGeneration.from_pretrained`` and
``AutoProcessor.from_pretrained`` load it like Janus-Pro.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    GenerationConfig,
    JanusConfig,
    JanusForConditionalGeneration,
    JanusProcessor,
    JanusVisionConfig,
    JanusVQVAEConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.janus.image_processing_pil_janus import JanusImageProcessorPil

from ..policies.janus import set_image_generation
from .grammar import COLORS, NUMBERS, SHAPES
from .renderer import IMAGE_SIZE

CHECKPOINT = Path(__file__).parent / "checkpoint"
LLAMAGEN_CHECKPOINT = Path(__file__).parent / "checkpoint_llamagen"
# Names that stand for a model in this package.
SHIPPED = {"shapes-janus": str(CHECKPOINT), "shapes-llamagen": str(LLAMAGEN_CHECKPOINT)}
GUIDANCE = 1.5  # the scale at which the shipped model draws best
GRID = 9
IMAGE_CODES = 512

# Janus-Pro's special tokens, by their official spelling.
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
IMAGE, IMAGE_START, IMAGE_END = "<image_placeholder>", "<begin_of_image>", "<end_of_image>"
USER, ASSISTANT = "<|User|>", "<|Assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, IMAGE, IMAGE_START, IMAGE_END, USER, ASSISTANT)

# Janus-Pro's conversation format: "<|User|>: text\n\n<|Assistant|>:", the reply closed by the end-of-sentence token.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set role = '<|User|>' if message['role'] == 'user' else '<|Assistant|>' %}"
    "{{ role }}: "
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '\n\n' }}{% else %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|Assistant|>:{% endif %}"
)


def vocabulary() -> list[str]:
    """Special tokens, then every word a caption can hold."""
    plurals = [f"{shape}{'es' if shape.endswith('s') else 's'}" for shape in SHAPES]
    words = ["a", "an", "photo", "of", "and", "left", "right", "above", "below", ":", *NUMBERS.values()]
    return [*SPECIAL_TOKENS, "<unk>", *words, *COLORS, *SHAPES, *plurals]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer with Janus-Pro's special tokens; ``<unk>`` for words outside the world."""
    words = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, words[BOS])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": IMAGE, "boi_token": IMAGE_START, "eoi_token": IMAGE_END},
    )


def build_processor() -> JanusProcessor:
    """The processor Janus-Pro has, around the small tokenizer."""
    image_processor = JanusImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        min_size=IMAGE_SIZE // 2,
        do_pad=True,
        image_mean=[0.5, 0.5, 0.5],  # Janus-Pro's; pictures are decoded to [-1, 1], transformers' default is CLIP's
        image_std=[0.5, 0.5, 0.5],
    )
    return JanusProcessor(image_processor, build_tokenizer(), chat_template=CHAT_TEMPLATE, num_image_tokens=GRID * GRID)


def build_model(
    vq_config: JanusVQVAEConfig, hidden_size: int, layers: int, heads: int, grid: int = GRID
) -> JanusForConditionalGeneration:
    """A randomly initialised Janus whose image side is ``vq_config`` and whose understanding tower is minimal.

    It draws ``grid`` squared tokens; a side other than the shapes world's is for measurements.
    """
    tokenizer = build_tokenizer()
    vision = JanusVisionConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=IMAGE_SIZE // GRID * grid,
        patch_size=IMAGE_SIZE // GRID,
        mlp_ratio=2.0,
        projection_dim=hidden_size,
        num_image_tokens=grid * grid,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=max(256, grid * grid + 64),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    config = JanusConfig(
        text_config=text,
        vision_config=vision,
        vq_config=vq_config,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_length=text.max_position_embeddings,
    )
    set_image_generation(model, tokenizer.convert_tokens_to_ids(IMAGE_START), GUIDANCE)
    return model


def save_atomically(folder: Path, *parts: Any, **inside: Any) -> None:
    """Save models and processors under ``folder``, which appears only once it is complete; ``inside``: subfolders."""
    partial = folder.with_name(folder.name + ".new")
    if partial.exists():  # left by a run that was killed while saving
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    for part in parts:
        part.save_pretrained(partial)
    for name, part in inside.items():
        part.save_pretrained(partial / name)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
