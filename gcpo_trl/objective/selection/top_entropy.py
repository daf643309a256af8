"""The most uncertain tokens: the criterion of RL on text that GCPO argues against for images (sec. 4.2)."""

from jaxtyping import Bool
from torch import Tensor

from gcpo_trl.objective.selection._ranking import Count, highest
from gcpo_trl.objective.signals import Signals


def select(signals: Signals, eligible: Bool[Tensor, "batch seq"], count: Count) -> Bool[Tensor, "batch seq"]:
    """The `count` eligible positions of each row with the highest entropy; ties: lower index. Gradient: none."""
    return highest(signals.entropy, eligible, count)
