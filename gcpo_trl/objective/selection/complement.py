"""The tokens a selection left out: trains on what is said not to matter. A wrapper, not a strategy."""

from jaxtyping import Bool
from torch import Tensor


def complement(critical: Bool[Tensor, "batch seq"], valid: Bool[Tensor, "batch seq"]) -> Bool[Tensor, "batch seq"]:
    """Valid positions that are not critical. Gradient: none."""
    return valid & ~critical
