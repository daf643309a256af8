"""What image families share: tokens scored under a head without ever holding ``(batch, seq, vocab)``, and pictures.

Where only some tokens train, the head needs a gradient at those positions alone: `Scored` says at which, and whether
the others are scored at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.utils import ModelOutput

from .constraint import Constraint

CHUNK = 2048  # positions a tile: 2048 x 16384 fp32 logits are 134 MB
DECODE_BATCH = 16  # pictures a call of a VQ decoder, whose activations dwarf its output


@dataclass
class ImageScores(ModelOutput):
    """What the trainer reads after ``model(..., fused_lm_head=True)``: ``(batch, image tokens)`` each, fp32."""

    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    aux_loss: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Scored:
    """Which tokens the head scores. ``positions`` carry gradient; None means all.

    rest: also score the positions that do not train, without gradient.

    entropy_gradient: let gradient flow through the entropies, which keeps several copies of the logits of a tile.
    """

    positions: Bool[Tensor, "batch seq"] | None = None
    rest: bool = True
    entropy_gradient: bool = True


ALL = Scored()


def score_tokens(
    head: Callable[[Tensor], Tensor],
    hidden: Float[Tensor, "batch seq dim"],
    tokens: Int[Tensor, "batch seq"],
    temperature: float,
    chunk: int = CHUNK,
    scored: Scored = ALL,
    constraint: Constraint | None = None,
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
    """``(log_probs, entropies)`` of ``tokens``, fp32, tile by tile; tiles are recomputed in the backward pass.

    Both are 0 where ``scored`` leaves a token out. Codes that ``constraint`` forbids have probability zero, as they had
    while sampling.
    Gradient: flows to ``hidden`` and the head from the positions that ``scored`` names.
    """

    def tile(states: Tensor, ids: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        logits = head(states).float() / temperature
        if constraint is not None:
            logits = logits.masked_fill(~constraint.allowed[kinds], -torch.inf)
        log_probs = logits.log_softmax(-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and scored.entropy_gradient):
            # The smallest number instead of -inf, because 0 * -inf is NaN, and so is its gradient.
            entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)
        return log_probs.gather(-1, ids[:, None])[:, 0], entropy

    # As many calls of the head on every rank, however many tokens each selects: a sharded head is gathered at each.
    count = -(-tokens.numel() // chunk)

    def score(states: Tensor, ids: Tensor, kinds: Tensor) -> tuple[Tensor, Tensor]:
        several = count > 1 and torch.is_grad_enabled()
        tiles = [
            checkpoint(tile, *parts, use_reentrant=False) if several else tile(*parts)
            for parts in zip(*(each.tensor_split(count) for each in (states, ids, kinds)), strict=True)
        ]
        log_probs, entropies = (torch.cat(parts) for parts in zip(*tiles, strict=True))
        return log_probs, entropies

    kinds = tokens if constraint is None else constraint.kinds.expand_as(tokens)  # without a constraint nobody reads it
    if scored.positions is None:
        log_probs, entropies = score(hidden.flatten(0, 1), tokens.flatten(), kinds.flatten())
        return log_probs.view(tokens.shape), entropies.view(tokens.shape)
    both = [hidden.new_zeros(tokens.shape, dtype=torch.float32) for _ in range(2)]
    for where, graded in ((scored.positions, True), (~scored.positions, False)):
        if graded or scored.rest:
            with torch.set_grad_enabled(torch.is_grad_enabled() and graded):
                found = score(hidden[where], tokens[where], kinds[where])
            both = [whole.masked_scatter(where, part) for whole, part in zip(both, found, strict=True)]
    return both[0], both[1]


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """Pictures of ``(batch, height, width, 3)`` in [-1, 1]; levels are cut, not rounded, as Janus' processor does."""
    levels = ((pixels.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).cpu().numpy()
    return [Image.fromarray(picture) for picture in levels]
