"""How much of a scene survives the image tokenizer: is a ground-truth picture still judged right after it?"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from PIL import Image

from reward_funcs.shapes import judge_image

from ..shapes.grammar import TASKS, all_specs
from ..shapes.renderer import draw
from ..shapes.train_tokenizer import encode


def reconstruct(tokenizer: Any, pictures: list[Image.Image]) -> list[Image.Image]:
    """Pictures encoded to ids and decoded again by a `JanusVQVAE`."""
    ids = encode(tokenizer, np.stack([np.asarray(picture) for picture in pictures]))
    with torch.no_grad():
        pixels = torch.cat([tokenizer.decode(part) for part in ids.split(128)]).permute(0, 2, 3, 1)
    levels = ((pixels.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).numpy()
    return [Image.fromarray(picture) for picture in levels]


def reconstruction_accuracy(tokenizer: Any, scenes_a_task: int = 300, seed: int = 5) -> dict[str, float]:
    """Share of reconstructed ground-truth scenes judged exactly right, by task."""
    generator = random.Random(seed)
    shares = {}
    for task in TASKS:
        specs = [generator.choice(all_specs(task)) for _ in range(scenes_a_task)]
        pictures = reconstruct(tokenizer, [draw(spec, generator) for spec in specs])
        right = [judge_image(picture, spec.metadata).exact for picture, spec in zip(pictures, specs, strict=True)]
        shares[task] = sum(right) / len(right)
    return shares
