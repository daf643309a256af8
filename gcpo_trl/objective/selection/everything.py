"""Every token: plain GRPO."""

from jaxtyping import Bool
from torch import Tensor

from gcpo_trl.objective.selection._ranking import Count
from gcpo_trl.objective.signals import Signals


def select(signals: Signals, eligible: Bool[Tensor, "batch seq"], count: Count) -> Bool[Tensor, "batch seq"]:
    """All eligible positions; `count` does not matter. Gradient: none."""
    return eligible.clone()
