"""Janus and Janus-Pro through transformers' own ``JanusForConditionalGeneration``.

Image tokens live in their own vocabulary: they are embedded by ``generation_embeddings`` and ``generation_aligner`` and
predicted by ``generation_head``. ``model.forward`` and ``get_output_embeddings`` know the text head only, which gives
plausible and wrong log-probabilities for image tokens; `attach_head` replaces that path.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor, JanusForConditionalGeneration

from ..objective.layout import Layout
from .base import NextLogits, PromptBatch
from .decoding.image_head import ALL, DECODE_BATCH, ImageScores, Scored, score_tokens, to_pictures
from .decoding.llama_decoder import positions
from .decoding.state import DecodeState, Generator, begin

MODEL_TYPES = ("janus",)
# Linear layers of each part, as a pattern of their names. "q_proj" alone would also hit the vision tower.
LORA_LAYERS = {
    "language_model": r"language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    "generation_head": r"generation_head\.(proj_out|vision_head)",
    "generation_aligner": r"generation_aligner\.(fc1|hidden_layers\.\d+)",
}
# What stays whole where the language model is quantised. transformers spares the output embeddings, which is the text
# head; images are drawn with these, and together they are small.
UNQUANTISED = (
    "lm_head",
    *(f"model.{part}" for part in ("vision_model", "aligner", "vqmodel")),
    *(f"model.generation_{part}" for part in ("embeddings", "aligner", "head")),
)


class JanusPolicy:
    """Janus as an `ImagePolicy`. ``model`` is the plain module, also when PEFT or an engine wraps it elsewhere."""

    generates_images = True
    modules = {
        "language_model": "model.language_model",
        "generation_head": "model.generation_head",
        "generation_aligner": "model.generation_aligner",
        "generation_embeddings": "model.generation_embeddings",
    }
    default_modules = ("language_model",)

    def __init__(self, model: JanusForConditionalGeneration, processor: Any) -> None:
        self.model = model
        self.processor = processor
        self.scored = ALL
        tokenizer = processor.tokenizer
        self.bos_id = tokenizer.bos_token_id
        self.pad_id = tokenizer.pad_token_id
        self.image_start_id = tokenizer.convert_tokens_to_ids(processor.image_start_token)
        self.layout = image_layout(model.config)
        self.num_tokens = self.layout.tokens
        self.widths = (1,) * self.num_tokens

    def set_generation(self, guidance_scale: float) -> None:
        """Let ``generate(generation_mode="image")`` of plain transformers draw from a saved checkpoint as we do."""
        set_image_generation(self.model, self.image_start_id, guidance_scale)

    # encode

    def encode(self, prompts: Sequence[Any]) -> PromptBatch:
        """Prompts (strings, or conversations) as the processor makes them for image generation.

        The unconditional prompt keeps BOS and begin-of-image and blanks every other id with padding, under the same
        mask, as transformers' ``generate(generation_mode="image")`` does.
        """
        inputs = self.processor(
            text=[self._template(prompt) for prompt in prompts],
            generation_mode="image",
            padding=True,
            padding_side="left",
            return_tensors="pt",
        )
        ids = inputs["input_ids"].to(self.model.device)
        words = (ids != self.bos_id) & (ids != self.image_start_id)
        return PromptBatch(ids, inputs["attention_mask"].to(ids.device), ids.masked_fill(words, self.pad_id))

    def _template(self, prompt: Any) -> str:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        messages = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m["content"], str) else m
            for m in prompt
        ]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    # start / step

    @torch.no_grad()
    def start(
        self, prompts: PromptBatch, rows: Tensor, guided: bool, plain: bool = False, into: DecodeState | None = None
    ) -> tuple[DecodeState, NextLogits]:
        """Prefill conditional and unconditional prompts once each, then copy their cache to the rows that need it."""
        ids = torch.cat([prompts.ids, prompts.unconditional_ids]) if guided else prompts.ids
        mask = torch.cat([prompts.mask, prompts.unconditional_mask]) if guided else prompts.mask
        rows = rows.to(ids.device)
        both = torch.cat([rows, rows + len(prompts.ids)]) if guided else rows
        inner = self.model.model
        embed = self.model.prepare_embeddings_for_image_generation
        generator = Generator(inner.language_model, inner.generation_head, embed, self.token_table)
        embeddings = inner.language_model.embed_tokens(ids)
        # The last token is drawn and not fed, so the cache has no place for it.
        return begin(generator, embeddings, mask, both, self.num_tokens - 1, guided, plain, into)

    @torch.no_grad()
    def step(self, state: DecodeState, tokens: Tensor) -> NextLogits:
        """Append the newest token of each image, ``(batch, 1)``; the unconditional rows see the same token."""
        return state.step(tokens)

    # logits at given positions

    def attach_head(self, model: JanusForConditionalGeneration, temperature: float) -> None:
        """Patch ``model.forward`` (TRL's ``fused_lm_head`` contract): labels that are not -100 are image tokens.

        The last ``num_tokens`` columns of ``input_ids`` are image tokens, the ones before them text. Which of them are
        scored is what ``self.scored`` says at that moment.
        """
        original, num_tokens, policy = model.forward, self.num_tokens, self

        def forward(module: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return original(*args, **kwargs)
            ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
            return teacher_forced(module, ids, mask, num_tokens, temperature, policy.scored)

        model.forward = types.MethodType(forward, model)

    # decode, layout

    @torch.no_grad()
    def pixels(self, tokens: Tensor) -> Tensor:
        """``(batch, height, width, 3)`` in [-1, 1] of token grids ``(batch, seq)``, still on the device."""
        parts = [self.model.decode_image_tokens(part) for part in tokens.split(DECODE_BATCH)]
        return torch.cat(parts)  # channels last: transformers has moved them

    def decode(self, tokens: Tensor) -> list[Image.Image]:
        """Pictures of token grids ``(batch, seq)``."""
        return to_pictures(self.pixels(tokens))

    @torch.no_grad()
    def token_table(self, space: str = "aligner") -> Tensor:
        """``aligner``: what the language model reads (the authors' choice for Janus). ``codebook``: the VQ codes."""
        if space == "codebook":
            return self.model.model.vqmodel.quantize.embedding.weight
        codes = torch.arange(self.model.config.vq_config.num_embeddings, device=self.model.device)
        return self.model.prepare_embeddings_for_image_generation(codes)


def image_layout(config: Any) -> Layout:
    """The token grid; raises ValueError where the configuration contradicts itself."""
    tokens, side = config.vision_config.num_image_tokens, config.vq_config.num_patches
    if side * side != tokens:
        raise ValueError(
            f"the model draws {tokens} image tokens but its VQ decoder reads a {side}x{side} grid; set "
            "vision_config.num_image_tokens to the square of image_size // patch_size"
        )
    return Layout.raster(side, side)


def teacher_forced(
    model: JanusForConditionalGeneration,
    input_ids: Tensor,
    attention_mask: Tensor,
    num_tokens: int,
    temperature: float,
    scored: Scored = ALL,
) -> ImageScores:
    """Score the image tokens that end ``input_ids`` ``(batch, prompt + num_tokens)`` with the image head.

    Position t is predicted from the hidden state one before it. Gradient: flows to the language model and the head,
    from the tokens that ``scored`` names.
    """
    prompt, tokens = input_ids[:, :-num_tokens], input_ids[:, -num_tokens:]
    language_model = model.model.language_model
    # The last token predicts nothing, so it is not fed.
    embeddings = torch.cat(
        [language_model.embed_tokens(prompt), model.prepare_embeddings_for_image_generation(tokens[:, :-1])], dim=1
    )
    mask = attention_mask[:, :-1]
    hidden = language_model(
        inputs_embeds=embeddings, attention_mask=mask, position_ids=positions(mask), use_cache=False
    ).last_hidden_state[:, -num_tokens:]
    log_probs, entropies = score_tokens(model.model.generation_head, hidden, tokens, temperature, scored=scored)
    return ImageScores(log_probs=log_probs, entropy=entropies)


def set_image_generation(model: JanusForConditionalGeneration, image_start_id: int, guidance_scale: float) -> None:
    """What transformers' image generation reads of ``generation_config`` and has no default for."""
    model.generation_config.guidance_scale = guidance_scale
    model.generation_config.generation_kwargs = {"boi_token_id": image_start_id}


def adapt(model: JanusForConditionalGeneration, processor: Any) -> JanusPolicy:
    """The policy around a loaded model."""
    return JanusPolicy(model, processor)


def load(model_id: str, **kwargs: Any) -> JanusPolicy:
    """Load model and processor from a path or an id; keyword arguments go to ``from_pretrained``."""
    config = AutoConfig.from_pretrained(model_id)
    if config.model_type != "janus":
        raise ValueError(f"{model_id} holds a {config.model_type!r} model; this adapter loads 'janus' checkpoints")
    image_layout(config)
    model = JanusForConditionalGeneration.from_pretrained(model_id, **kwargs).eval()
    return JanusPolicy(model, AutoProcessor.from_pretrained(model_id))
