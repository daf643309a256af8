"""Random models to measure on: transformers' Janus in any size, with the shapes world's tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..policies.janus import JanusPolicy
from ..shapes.build import build_model, build_processor
from ..shapes.train_tokenizer import tokenizer_config

PROMPT = "a photo of a red circle and a blue ring"


@dataclass(frozen=True)
class Size:
    """A policy: ``grid`` squared image tokens of ``codes`` kinds, ``group`` images of one prompt."""

    hidden: int
    layers: int
    heads: int
    grid: int
    codes: int
    group: int


def build_policy(size: Size) -> JanusPolicy:
    """A random policy, on the GPU in bf16 if there is one, else in fp32."""
    torch.manual_seed(0)
    config = tokenizer_config(4 * size.grid, size.grid, size.codes, size.hidden)
    model = build_model(config, size.hidden, size.layers, size.heads, size.grid)
    if torch.cuda.is_available():
        model = model.to("cuda", torch.bfloat16)
    return JanusPolicy(model.eval(), build_processor())


def prompts_of(size: Size) -> list[Any]:
    """One group."""
    return [PROMPT] * size.group
