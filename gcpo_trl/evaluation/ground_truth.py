"""Can the judge be trusted? Ground truth as drawn, under another caption, and after the image tokenizer."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from reward_funcs.shapes import judge_image

from ..shapes.grammar import TASKS, Spec, all_specs
from ..shapes.renderer import draw
from ..shapes.train_tokenizer import encode


def scenes_of(task: str, count: int, seed: int = 5) -> tuple[list[Spec], list[Image.Image]]:
    """Specs of one task and their ground-truth pictures."""
    generator = random.Random(f"{seed}-{task}")
    specs = [generator.choice(all_specs(task)) for _ in range(count)]
    return specs, [draw(spec, generator) for spec in specs]


def accuracy(specs: Sequence[Spec], pictures: Sequence[Image.Image]) -> float:
    """Share of pictures that show exactly their spec."""
    return float(np.mean([judge_image(p, spec.metadata).exact for p, spec in zip(pictures, specs, strict=True)]))


def rejection(specs: Sequence[Spec], pictures: Sequence[Image.Image], seed: int = 6) -> float:
    """Share of pictures rejected under the caption of another scene of the same task, with another canonical key.

    A caption that the picture also satisfies ("two circles" for two red ones) is not another caption: passed over.
    """
    generator = random.Random(seed)
    pool = all_specs(specs[0].tag)
    rejected = []
    for spec, picture in zip(specs, pictures, strict=True):
        other = generator.choice(pool)
        while implies(spec, other):
            other = generator.choice(pool)
        rejected.append(1 - judge_image(picture, other.metadata).exact)
    return float(np.mean(rejected))


def implies(spec: Spec, other: Spec) -> bool:
    """Whether a picture of ``spec`` also shows ``other``: the same but for colours that ``other`` leaves open."""
    if spec.key == other.key:
        return True
    unpainted = [(item.shape, item.count) for item in spec.items] == [(i.shape, i.count) for i in other.items]
    return unpainted and spec.relation == other.relation and any(item.color is None for item in other.items)


def reconstruct(tokenizer: Any, pictures: Sequence[Image.Image]) -> list[Image.Image]:
    """Pictures encoded to ids and decoded again by a `JanusVQVAE`."""
    ids = encode(tokenizer, np.stack([np.asarray(picture) for picture in pictures]))
    with torch.no_grad():
        pixels = torch.cat([tokenizer.decode(part) for part in ids.split(128)]).permute(0, 2, 3, 1)
    levels = ((pixels.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()
    return [Image.fromarray(picture) for picture in levels]


def ground_truth_table(tokenizer: Any, scenes_a_task: int = 1000) -> str:
    """Markdown: accepted, rejected under another caption, accepted after encoding and decoding; a row a task."""
    lines = ["| task | accepted | other caption rejected | accepted after the image tokenizer |", "|---|---|---|---|"]
    for task in TASKS:
        specs, pictures = scenes_of(task, scenes_a_task)
        kept = accuracy(specs, reconstruct(tokenizer, pictures))
        lines.append(f"| {task} | {accuracy(specs, pictures):.3f} | {rejection(specs, pictures):.3f} | {kept:.3f} |")
    return "\n".join(lines)
