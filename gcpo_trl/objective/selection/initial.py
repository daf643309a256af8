"""The first tokens of the sequence: every later token depends on them (GCPO sec. 4.1, Z_init of sec. 5.1)."""

from jaxtyping import Bool
from torch import Tensor

from gcpo_trl.objective.selection._ranking import Count, first
from gcpo_trl.objective.signals import Signals


def select(signals: Signals, eligible: Bool[Tensor, "batch seq"], count: Count) -> Bool[Tensor, "batch seq"]:
    """The first `count` eligible positions of each row. Gradient: none."""
    return first(eligible, count)
