"""Pretrains the tiny policies of the shapes world on captions and rendered scenes, deliberately imperfectly.

Like web data, the captions are noisy: with the probability of its stage the picture differs from its caption in one
respect (a class, a colour, a number, a relation). The model then draws clean shapes but often not the ones asked for,
which leaves reinforcement learning something to improve and lets classifier-free guidance help.
Held-out canonical keys never appear, neither as captions nor, by design of the noise, as the caption of a picture.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import JanusForConditionalGeneration, JanusProcessor, JanusVQVAE, PreTrainedModel

from ..policies.janus import JanusPolicy
from .build import build_model, build_processor, save_atomically
from .grammar import COLORS, INVERSE, SHAPES, TASKS, Item, Spec, all_specs, split_specs
from .localize import encode_tiles
from .renderer import draw, gradient

# (steps, caption noise, tasks in turn), each stage with its own warm-up and cosine: a second start after the picture
# side has settled is what lets the words for colours take hold, and binding colours to shapes needs the most practice.
STAGES = (
    (1600, 0.4, TASKS),
    (2200, 0.25, TASKS),
    (1000, 0.25, (*TASKS, "color_attr", "color_attr", "color_attr", "position", "two_object")),
)
# Six prompts for single objects are learnt so well that at the noise of the others every picture is right.
LEAST_NOISE = {"single_object": 0.6}
CAPTION_DROPOUT = 0.1  # share of captions blanked, so that the unconditional branch of guidance is trained


def corrupt(spec: Spec, generator: random.Random) -> Spec:
    """The spec with one thing changed: what a careless annotator would have looked at."""
    index = generator.randrange(len(spec.items))
    item = spec.items[index]
    changes = ["shape"]
    if item.color:
        changes += ["color", "color"]
    if spec.relation:
        changes += ["relation", "relation"]
    if spec.tag == "counting":
        changes += ["count", "count"]
    if spec.tag in ("single_object", "colors", "two_object"):
        changes += ["number"]
    match generator.choice(changes):
        case "shape":
            item = dataclasses.replace(item, shape=generator.choice([s for s in SHAPES if s != item.shape]))
        case "color":
            item = dataclasses.replace(item, color=generator.choice([c for c in COLORS if c != item.color]))
        case "count":
            item = dataclasses.replace(item, count=generator.choice([n for n in (1, 2, 3, 4) if n != item.count]))
        case "number":
            item = dataclasses.replace(item, count=2)
        case "relation":
            return dataclasses.replace(spec, relation=INVERSE[spec.relation or "left of"])
    items = list(spec.items)
    items[index] = Item(item.shape, item.color, item.count)
    return dataclasses.replace(spec, items=tuple(items))


def scenes(count: int, seed: int, noise: float, tasks: Sequence[str] = TASKS) -> tuple[list[str], np.ndarray]:
    """Captions and uint8 pictures ``(count, height, width, 3)`` of training specs, tasks in turn.

    noise: share of pictures that differ from their caption in one respect; 0 gives none, whatever ``LEAST_NOISE`` says.
    """
    generator = random.Random(seed)
    pools = [split_specs(tag)[0] for tag in tasks]
    captions, pictures = [], []
    for i in range(count):
        spec = generator.choice(pools[i % len(pools)])
        wrong = generator.random() < max(noise, LEAST_NOISE.get(spec.tag, 0.0) if noise else 0.0)
        drawn = corrupt(spec, generator) if wrong else spec
        captions.append(spec.prompt)
        pictures.append(np.asarray(draw(drawn, generator)))
    return captions, np.stack(pictures)


def any_scenes(count: int, seed: int) -> np.ndarray:
    """uint8 pictures ``(count, height, width, 3)`` of any spec on gradients: the tokenizer never sees a caption."""
    generator = random.Random(seed)
    pools = [all_specs(tag) for tag in TASKS]
    return np.stack(
        [np.asarray(draw(generator.choice(pools[i % len(pools)]), generator, gradient)) for i in range(count)]
    )


def encode_captions(processor: JanusProcessor, captions: list[str]) -> tuple[Tensor, Tensor]:
    """Prompt ids and mask ``(batch, seq)``, left-padded, exactly as the processor makes them for image generation."""
    texts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "text", "text": caption}]}], add_generation_prompt=True
        )
        for caption in captions
    ]
    inputs = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    return inputs["input_ids"], inputs["attention_mask"]


def blank(ids: Tensor, keep: tuple[int, int], pad: int, rows: Tensor) -> Tensor:
    """Unconditional prompts in the chosen rows: every id but BOS and begin-of-image becomes padding."""
    words = (ids != keep[0]) & (ids != keep[1]) & rows[:, None]
    return ids.masked_fill(words, pad)


def caption_loss(model: JanusForConditionalGeneration, prompts: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Mean cross entropy of the image tokens ``(batch, seq)`` given their prompts. Gradient: flows to the model."""
    inner = model.model
    embeddings = torch.cat(
        [inner.language_model.embed_tokens(prompts), model.prepare_embeddings_for_image_generation(tokens[:, :-1])], 1
    )
    mask = torch.cat([mask, mask.new_ones(tokens[:, :-1].shape)], 1)
    hidden = inner.language_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
    logits = inner.generation_head(hidden[:, prompts.shape[1] - 1 :])
    return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())


class Learner(Protocol):
    """A policy in pretraining: what trains, how it reads captions, and its loss on pictures as tokens."""

    stages: Sequence[tuple[int, float, Sequence[str]]]
    model: PreTrainedModel
    parameters: list[Tensor]

    def encode(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Captions as tensors ``(captions, ...)``, made once for a pool of scenes."""
        ...

    def loss(self, encoded: tuple[Tensor, ...], tokens: Tensor, dropped: Tensor) -> Tensor:
        """Mean cross entropy of ``tokens (batch, seq)``; the captions of ``dropped`` rows are left out."""
        ...


class JanusLearner:
    """The tiny Janus: language model and image parts train, the image tokenizer does not."""

    stages = STAGES

    @classmethod
    def fresh(cls, tokenizer: JanusVQVAE, hidden_size: int, layers: int, heads: int) -> JanusLearner:
        """A random policy around the weights of a trained image tokenizer."""
        model = build_model(tokenizer.config, hidden_size, layers, heads)
        model.model.vqmodel.load_state_dict(tokenizer.state_dict())
        model.model.generation_embeddings.weight.data.copy_(tokenizer.quantize.embedding.weight)
        return cls(model, build_processor())

    @classmethod
    def open(cls, folder: Path) -> JanusLearner:
        """What `save` wrote, in fp32."""
        return cls(JanusForConditionalGeneration.from_pretrained(folder, dtype=torch.float32), build_processor())

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Model and processor in transformers' layout; the model in memory then has the rounded weights, in fp32."""
        save_atomically(folder, self.model.to(dtype), self.processor)
        self.model.float()

    def policy(self) -> JanusPolicy:
        return JanusPolicy(self.model, self.processor)

    def __init__(self, model: JanusForConditionalGeneration, processor: JanusProcessor) -> None:
        self.model, self.processor = model, processor
        inner, ids = model.model, processor.tokenizer
        self.keep = (ids.bos_token_id, ids.convert_tokens_to_ids(processor.image_start_token))
        parts = (
            inner.language_model,
            inner.generation_embeddings,
            inner.generation_aligner,
            inner.generation_head,
        )
        self.parameters = [parameter for part in parts for parameter in part.parameters()]

    def encode(self, captions: list[str]) -> tuple[Tensor, ...]:
        return encode_captions(self.processor, captions)

    def loss(self, encoded: tuple[Tensor, ...], tokens: Tensor, dropped: Tensor) -> Tensor:
        prompts, mask = encoded
        pad = self.processor.tokenizer.pad_token_id
        return caption_loss(self.model, blank(prompts, self.keep, pad, dropped), mask, tokens)


def train_policy(
    learner: Learner,
    tokenizer_model: JanusVQVAE,
    steps: int,
    noise: float,
    tasks: Sequence[str] = TASKS,
    seed: int = 0,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    pool: int = 12288,
) -> dict[str, float]:
    """Train ``learner`` in place for ``steps``; a fresh pool of scenes is drawn whenever the last one is used up."""
    generator = torch.Generator().manual_seed(seed)
    model, trained = learner.model, learner.parameters
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    model.set_attn_implementation("eager")  # twice as fast as sdpa in bf16 on a CPU at this size
    model.train()
    round_, losses, order = 0, [], torch.empty(0, dtype=torch.long)
    bar = tqdm(range(steps), desc="tiny policy", mininterval=5)
    for step in bar:
        if len(order) < batch_size:
            captions, pictures = scenes(pool, seed * 100_003 + round_, noise, tasks)
            tokens, encoded = encode_tiles(tokenizer_model, pictures), learner.encode(captions)
            order, round_ = torch.randperm(pool, generator=generator).repeat(2), round_ + 1
        rows, order = order[:batch_size], order[batch_size:]
        dropped = torch.rand(batch_size, generator=generator) < CAPTION_DROPOUT
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 200) * 0.5 * (1.02 + math.cos(math.pi * step / steps))
        with torch.autocast("cpu", torch.bfloat16):
            loss = learner.loss(tuple(part[rows] for part in encoded), tokens[rows], dropped)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.4f}", refresh=False)
    model.eval()
    model.set_attn_implementation("sdpa")
    return {"loss": float(np.mean(losses[-200:]))}
