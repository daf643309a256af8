"""Tokens drawn without looking: the control that every criterion has to beat."""

import torch
from jaxtyping import Bool
from torch import Tensor

from gcpo_trl.objective.selection._ranking import Count, lowest
from gcpo_trl.objective.signals import Signals


def select(signals: Signals, eligible: Bool[Tensor, "batch seq"], count: Count) -> Bool[Tensor, "batch seq"]:
    """`count` eligible positions of each row, uniformly without replacement, from `signals.generator`.

    The numbers are drawn row by row on the generator's device, so a generator on the CPU gives the same tokens on
    every device and for every way of cutting the batch into chunks.

    Gradient: none.
    """
    generator = signals.generator
    if generator is None:
        raise ValueError("the strategy 'random' draws from signals.generator, which is None; pass a torch.Generator")
    scores = torch.rand(eligible.shape, generator=generator, device=generator.device)
    return lowest(scores.to(eligible.device), eligible, count)
