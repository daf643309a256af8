"""The image head at the critical tokens alone, where that is the same loss.

TRL multiplies what a token adds to the loss by its mask, so log-probabilities at other positions need no gradient. They
need values only for the weight, which sums over all tokens up to each: the rollout's own while the policy is still the
one that sampled them, else a pass without gradient. A weight that is not detached, and a divergence on all tokens, need
gradients everywhere.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..policies.decoding.image_head import ALL, Scored
from .masks import loss_mask

LOGPS = "rollout_per_token_logps"  # the key in TRL's batch, which is shuffled and split with the rest


def with_rollout_logps(batch: dict[str, Any], rollout: Any, model: Any, args: Any) -> dict[str, Any]:
    """The batch with the log-probabilities seen while sampling, where they can stand for those of the loss.

    Not in half precision: there the two differ by more than rounding, and a policy that has not moved yet would not
    have the weight 1. Not for the linear weight, which is exactly 0 at the start, where AdamW would make steps of any
    rounding. Not once an update lies between rollout and loss, which TRL marks by ``old_per_token_logps``.
    """
    half = args.bf16 or args.fp16 or any(parameter.dtype.itemsize < 4 for parameter in model.parameters())
    wanted = args.weight_form == "exp" and args.weight_detach and args.divergence_on == "critical"
    wanted = wanted and "old_per_token_logps" not in batch
    return {**batch, LOGPS: rollout.logps} if wanted and rollout is not None and not half else batch


@contextlib.contextmanager
def selected_only(
    policy: Any, args: Any, inputs: dict[str, Any], entropy_bonus: bool
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Let an image policy score the critical tokens of ``inputs`` only; yields what completes its log-probabilities."""
    if not policy.generates_images:
        yield lambda logps: logps
        return
    positions = None
    everywhere = args.divergence_on == "all" or (args.needs_weight and not args.weight_detach)
    if "tool_mask" in inputs and not everywhere:
        positions = loss_mask(inputs)
    known = inputs.get(LOGPS) if args.needs_weight else inputs.get("old_per_token_logps")
    rest = args.needs_weight and known is None
    policy.scored = Scored(positions, rest, entropy_bonus)
    try:
        if positions is None or rest or known is None:
            yield lambda logps: logps
        else:
            yield lambda logps: torch.where(positions, logps, known)
    finally:
        policy.scored = ALL
