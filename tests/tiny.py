"""Tiny random models of the real classes, made on the spot: a Janus of 81 image tokens and a text model.

The Janus' weights are drawn wider than transformers draws them, so that its distributions differ from one position
and one prompt to the next, as those of a trained model do.
"""

import gc
import importlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoProcessor,
    JanusForConditionalGeneration,
    JanusVQVAE,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TrainerCallback,
)
from trl import GRPOConfig, GRPOTrainer

import gcpo_trl
from gcpo_trl.policies.janus import JanusPolicy
from gcpo_trl.shapes import llamagen as shapes_llamagen
from gcpo_trl.shapes.build import build_model, build_processor
from gcpo_trl.shapes.train_tokenizer import tokenizer_config

IMAGE_SIZE, GRID, CODES, HIDDEN, LAYERS, HEADS = 36, 9, 64, 32, 2, 4
TOKENS = GRID * GRID
# Factors on transformers' initial 0.02: conditional entropies then lie between 0.1 and 4 of at most ln 64 = 4.2 nats.
SPREAD = {"language_model": 8.0, "generation_aligner": 8.0, "generation_head": 12.0}
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(28))]
PROMPTS = ["a photo of a red circle", "a photo of two blue squares and a green cross left of a heart"]


def build_janus(seed: int = 0) -> JanusForConditionalGeneration:
    """A random Janus that was never saved."""
    torch.manual_seed(seed)
    model = build_model(tokenizer_config(IMAGE_SIZE, GRID, CODES, HIDDEN), HIDDEN, LAYERS, HEADS)
    with torch.no_grad():
        for name, factor in SPREAD.items():
            for parameter in model.model.get_submodule(name).parameters():
                if parameter.dim() > 1:
                    parameter.mul_(factor)
    return model.eval()


def save_janus(folder: Path) -> str:
    """The Janus and its processor under ``folder``, built once a session."""
    if not folder.exists():
        build_janus().save_pretrained(folder)
        build_processor().save_pretrained(folder)
    return str(folder)


class Zero3:
    """A DeepSpeed configuration as transformers asks about it."""

    def is_zero3(self) -> bool:
        return True


def save_llamagen(folder: Path) -> str:
    """A random text-conditional LlamaGen of 81 image tokens, its processor and its T5 under ``folder``."""
    if not folder.exists():
        torch.manual_seed(0)
        tokenizer = JanusVQVAE(tokenizer_config(IMAGE_SIZE, GRID, CODES, HIDDEN))
        model = shapes_llamagen.build_model(tokenizer, HIDDEN, LAYERS, HEADS)
        with torch.no_grad():
            for name, parameter in [*model.model.named_parameters(), *model.lm_head.named_parameters()]:
                if parameter.dim() > 1 and "embed" not in name:
                    parameter.mul_(8.0)
            model.model.embed_tokens.weight.mul_(40.0)
        model.save_pretrained(folder)
        shapes_llamagen.build_processor().save_pretrained(folder)
        shapes_llamagen.build_text_encoder().save_pretrained(folder / shapes_llamagen.TEXT_ENCODER)
    return str(folder)


def load_janus(path: str) -> tuple[JanusForConditionalGeneration, AutoProcessor]:
    return JanusForConditionalGeneration.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)


def build_text_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )


def save_text(folder: Path) -> str:
    """A random Llama and its tokenizer under ``folder``; it ends a sequence often enough that lengths differ."""
    if not folder.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        build_text_tokenizer().save_pretrained(folder)
    return str(folder)


def shape_prompts(rows: int = 4) -> Dataset:
    """Prompts of the shapes world with the metadata its judge reads."""
    include = [{"class": "circle", "count": 1, "color": "red"}]
    metadata = json.dumps({"tag": "colors", "include": include, "prompt": PROMPTS[0]})
    return Dataset.from_list([{"prompt": PROMPTS[row % 2], "metadata": metadata} for row in range(rows)])


def text_prompts(rows: int = 8) -> Dataset:
    """Prompts of one to three words."""
    words = [[f"w{(row + i) % 28}" for i in range(1 + row % 3)] for row in range(rows)]
    return Dataset.from_list([{"prompt": " ".join(prompt)} for prompt in words])


def redness(prompts, completions, **columns):
    """A reward of pictures: mean red level."""
    return [float(np.asarray(image)[..., 0].mean()) / 255 for image in completions]


def digits(prompts, completions, completion_ids, **columns):
    """A reward that differs widely between random images: the sum of their tokens, modulo 97."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def settings(folder, **changes):
    """Settings under which the tiny models train for a step, on the CPU, without leaving anything behind."""
    defaults = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_generations": 2,
        "max_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1e9,  # gradients as they are
        "beta": 0.04,
        "loss_type": "bnpo",
        "rollout_guidance_scale": 3.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    return gcpo_trl.GCPOConfig(output_dir=str(folder), **(defaults | changes))


def janus_trainer(
    model, folder, reward=digits, dataset=None, processor=None, peft_config=None, evaluated=None, **changes
):
    """A GCPOTrainer of the tiny Janus on two prompts, two images each."""
    return gcpo_trl.GCPOTrainer(
        model,
        reward,
        settings(folder, **changes),
        shape_prompts() if dataset is None else dataset,
        eval_dataset=evaluated,
        processing_class=processor,
        peft_config=peft_config,
    )


def variety(prompts, completions, **columns):
    """A reward of texts that differs inside a group: how many different words or signs a completion has."""
    texts = [one if isinstance(one, str) else one[0]["content"] or "" for one in completions]
    return [float(len(set(text.split() if " " in text else text))) for text in texts]


def text_trainer(model, folder, reward=variety, dataset=None, grpo=False, args=None, **parts):
    """A trainer of texts for one step of four completions, two a prompt; ``args`` change what it is told."""
    defaults = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 12,
        "max_steps": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": [],
        "disable_tqdm": True,
    }
    trainer, config = (GRPOTrainer, GRPOConfig) if grpo else (gcpo_trl.GCPOTrainer, gcpo_trl.GCPOConfig)
    settings = config(output_dir=str(folder), **(defaults | (args or {})))
    dataset = text_prompts() if dataset is None and "environment_factory" not in parts else dataset
    return trainer(model, reward, settings, dataset, **parts)


@dataclass
class Record:
    """What a trainer did: its batches as scored, losses, rewards, and the gradients of each optimiser step."""

    batches: list = field(default_factory=list)
    losses: list = field(default_factory=list)
    gradients: list = field(default_factory=list)


class _Gradients(TrainerCallback):
    def __init__(self, record):
        self.record = record

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        self.record.gradients.append(found)


def record(trainer):
    """Keep what the trainer does from here on. What is kept is not copied: a change made later shows."""
    kept, score, loss = Record(), trainer._generate_and_score_completions, trainer._compute_loss

    def scored(inputs):
        kept.batches.append(score(inputs))
        return kept.batches[-1]

    def computed(model, inputs):
        value = loss(model, inputs)
        kept.losses.append(value.item())
        return value

    trainer._generate_and_score_completions, trainer._compute_loss = scored, computed
    trainer.add_callback(_Gradients(kept))
    return kept


def disturb(model, share=0.05, seed=0):
    """Move a model away from its reference."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and parameter.requires_grad:
                parameter.add_(share * parameter.std() * torch.randn(parameter.shape, generator=generator))


@pytest.fixture(scope="session")
def libraries_frozen():
    """Every run ends in a garbage collection, half a second over all that the libraries hold; none of it is garbage."""
    importlib.import_module("gcpo_trl.trainer.gcpo_trainer")
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_janus(tmp_path_factory, libraries_frozen):
    """Path of a saved tiny Janus."""
    return save_janus(tmp_path_factory.getbasetemp() / "tiny-janus")


@pytest.fixture(scope="session")
def tiny_llamagen(tmp_path_factory, libraries_frozen):
    """Path of a saved tiny LlamaGen."""
    return save_llamagen(tmp_path_factory.getbasetemp() / "tiny-llamagen")


@pytest.fixture(scope="session")
def tiny_text(tmp_path_factory, libraries_frozen):
    """Path of a saved tiny text model."""
    return save_text(tmp_path_factory.getbasetemp() / "tiny-text")


@pytest.fixture(scope="session")
def shared_policy(tiny_janus):
    """The tiny Janus as a policy; for tests that only read it."""
    return JanusPolicy(*load_janus(tiny_janus))


@pytest.fixture
def policy(tiny_janus):
    """The tiny Janus as a policy of the test's own."""
    return JanusPolicy(*load_janus(tiny_janus))
