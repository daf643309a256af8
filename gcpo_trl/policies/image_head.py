"""What image families share: tokens scored without ever holding ``(batch, seq, vocab)``, and pixels made pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from ..objective.signals import entropy

CHUNK = 2048  # positions a tile: 2048 x 16384 fp32 logits are 134 MB

DECODE_BATCH = 16  # pictures a call of a VQ decoder, whose activations dwarf its output


@dataclass
class ImageScores(ModelOutput):
    """What the trainer reads after ``model(..., fused_lm_head=True)``: ``(batch, image tokens)`` each, fp32."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


def score_tokens(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "batch seq dim"],
    tokens: Int[Tensor, "batch seq"],
    temperature: float,
    chunk: int = CHUNK,
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
    """``(log_probs, entropies)`` of ``tokens``, fp32, tile by tile; tiles are recomputed in the backward pass.

    Gradient: flows to ``hidden`` and the head.
    """

    def tile(states: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float() / temperature
        return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0], entropy(logits)

    flat, ids = hidden.flatten(0, 1), tokens.flatten()
    several = len(flat) > chunk and torch.is_grad_enabled()
    tiles = [
        checkpoint(tile, states, part, use_reentrant=False) if several else tile(states, part)
        for states, part in zip(flat.split(chunk), ids.split(chunk), strict=True)
    ]
    log_probs, entropies = (torch.cat(parts).view(tokens.shape) for parts in zip(*tiles, strict=True))
    return log_probs, entropies


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pictures of ``(batch, height, width, 3)`` in [-1, 1]; levels are cut, not rounded, as Janus' processor does."""
    levels = ((pixels.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).cpu().numpy()
    return [Image.fromarray(picture) for picture in levels]
