"""Exact counts and stable ranks, so that the same signals give the same tokens on every device."""

from fractions import Fraction
from typing import overload

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Count = int | Int[Tensor, " batch"]


def first(eligible: Bool[Tensor, "batch seq"], count: Count) -> Bool[Tensor, "batch seq"]:
    """The first `count` eligible positions of each row; all of them where there are fewer. Gradient: none."""
    limit = count if isinstance(count, int) else count[:, None]
    return eligible & (eligible.cumsum(dim=-1) <= limit)


def lowest(
    scores: Float[Tensor, "batch seq"], eligible: Bool[Tensor, "batch seq"], count: Count
) -> Bool[Tensor, "batch seq"]:
    """The `count` eligible positions of each row with the lowest score; all of them where there are fewer.

    Of equal scores the lower index wins (torch.topk leaves that to the device). NaN ranks last.

    Gradient: none.
    """
    order = (scores + 0.0).argsort(dim=-1, stable=True)  # + 0.0 turns -0.0 into 0.0: they tie
    taken = first(eligible.gather(-1, order), count)
    return torch.zeros_like(eligible).scatter(-1, order, taken)


def highest(
    scores: Float[Tensor, "batch seq"], eligible: Bool[Tensor, "batch seq"], count: Count
) -> Bool[Tensor, "batch seq"]:
    """`lowest` for the highest scores, with the same rule for ties (lower index) and NaN (last). Gradient: none."""
    # Not a descending sort: it would put NaN first.
    return lowest(-scores, eligible, count)


@overload
def floor_share(fraction: float, tokens: int) -> int: ...
@overload
def floor_share(fraction: float, tokens: Tensor) -> Tensor: ...
def floor_share(fraction: float, tokens: int | Tensor) -> int | Tensor:
    """floor(fraction * tokens) for the decimal fraction that was meant: 0.29 of 100 is 29, not int(28.999...)."""
    exact = as_ratio(fraction)
    return tokens * exact.numerator // exact.denominator


def as_ratio(fraction: float) -> Fraction:
    """0.1 -> 1/10: the nearest ratio with a denominator of at most a million, more than any sequence has tokens."""
    return Fraction(fraction).limit_denominator(1_000_000)
