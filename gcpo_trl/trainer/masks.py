"""Two masks of a TRL batch, each with one meaning: the tokens that the policy sampled, and those that train.

completion_mask    not padding
tool_mask          from TRL: not the answer of a tool; once critical tokens are chosen, the critical tokens
policy_mask        then keeps what ``tool_mask`` said before
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def policy_mask(batch: dict[str, Any]) -> Tensor:
    """True on tokens that the policy sampled: neither padding nor a tool's answer. ``(batch, seq)``."""
    kept: Tensor | None = batch.get("policy_mask")
    return loss_mask(batch) if kept is None else kept


def loss_mask(batch: dict[str, Any]) -> Tensor:
    """True on tokens that train: all that the policy sampled, or the critical ones among them. ``(batch, seq)``."""
    mask: Tensor = (batch["completion_mask"] * batch.get("tool_mask", 1)).bool()
    return mask
