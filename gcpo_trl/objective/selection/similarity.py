"""Positions at which the images of a group differ most: what the reward can tell apart (GCPO sec. 4.3, Eq. 5)."""

from jaxtyping import Bool
from torch import Tensor

from gcpo_trl.objective.selection._ranking import Count, lowest
from gcpo_trl.objective.signals import Signals


def select(signals: Signals, eligible: Bool[Tensor, "batch seq"], count: Count) -> Bool[Tensor, "batch seq"]:
    """The `count` eligible positions of each row with the lowest similarity; ties: lower index. Gradient: none."""
    return lowest(signals.similarity, eligible, count)
