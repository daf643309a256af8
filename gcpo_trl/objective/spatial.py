"""Structure of the entropy map on the token grid (GCPO sec. 5.1).

    Hbar_t = mean(H_t, H_t^left, H_t^upper-left, H_t^up, H_t^upper-right)     (Eq. 4)
    G_t    = sqrt((d Hbar / d column)^2 + (d Hbar / d row)^2)                 (central difference)

The neighbours of Eq. 4 are the ones generated before the token. At the border the paper is silent; as in the
authors' code, only the neighbours that exist are averaged, and the difference is one-sided there.

A one-dimensional sequence is a grid of height 1: the mean is over {self, left}, and the row derivative is 0.
A position that is not `valid` (padding) counts as one that does not exist, and gets 0 itself.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def causal_neighborhood_mean(
    values: Float[Tensor, "batch height width"],
    valid: Bool[Tensor, "batch height width"] | None = None,
) -> Float[Tensor, "batch height width"]:
    """Mean of each cell and its left, upper-left, upper and upper-right neighbours that exist (GCPO Eq. 4).

    Gradient: none.
    """
    values, valid = _prepared(values, valid)
    total = _causal_neighborhood_sum(values)
    count = _causal_neighborhood_sum(valid.float())
    return torch.where(valid, total / count.clamp(min=1), 0.0)


def gradient_magnitude(
    values: Float[Tensor, "batch height width"],
    valid: Bool[Tensor, "batch height width"] | None = None,
) -> Float[Tensor, "batch height width"]:
    """Length of the gradient: (next - previous) / 2 inside, the plain difference where only one side exists.

    An axis along which a cell has no neighbour at all contributes 0.

    Gradient: none.
    """
    values, valid = _prepared(values, valid)
    along_rows = _difference(values.mT, valid.mT).mT
    along_columns = _difference(values, valid)
    return torch.where(valid, torch.sqrt(along_columns.square() + along_rows.square()), 0.0)


def _prepared(
    values: Float[Tensor, "batch height width"], valid: Bool[Tensor, "batch height width"] | None
) -> tuple[Float[Tensor, "batch height width"], Bool[Tensor, "batch height width"]]:
    """fp32 values with padding at 0 (whatever was there, NaN too), and the mask spelled out."""
    values = values.detach().float()
    if valid is None:
        return values, torch.ones_like(values, dtype=torch.bool)
    return torch.where(valid, values, 0.0), valid


def _causal_neighborhood_sum(values: Float[Tensor, "batch height width"]) -> Float[Tensor, "batch height width"]:
    """Self + left + upper-left + up + upper-right, with zeros outside the grid."""
    padded = F.pad(values, (1, 1, 1, 0))
    above, row = padded[:, :-1], padded[:, 1:]
    return row[..., 1:-1] + row[..., :-2] + above[..., :-2] + above[..., 1:-1] + above[..., 2:]


def _difference(
    values: Float[Tensor, "batch line width"], valid: Bool[Tensor, "batch line width"]
) -> Float[Tensor, "batch line width"]:
    """Along the last axis: the step between the neighbours that exist, divided by the distance between them."""
    has_previous, has_next = F.pad(valid, (1, 0))[..., :-1], F.pad(valid, (0, 1))[..., 1:]
    previous = torch.where(has_previous, F.pad(values, (1, 0))[..., :-1], values)
    following = torch.where(has_next, F.pad(values, (0, 1))[..., 1:], values)
    distance = has_previous.float() + has_next.float()
    return (following - previous) / distance.clamp(min=1)
