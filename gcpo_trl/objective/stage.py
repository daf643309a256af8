"""STAGE: weigh tokens by how they resemble those of the group's opposite samples, instead of masking.

    s_it = mean over j != i with A_i A_j <= 0 of cos(e_it, e_jt)
    advantage weight ~ clamp((1 - s) / 2, 0, 1), normalised by its sum over the sequence
    divergence weight = 1/2 + 1/2 clamp(1 + s, 0, 1)

A token that good and bad samples share explains no reward: it learns less and is held to the reference more.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gcpo_trl.objective.signals import NORM_EPS

NO_OPPOSITE = 0.0  # under which both weights are those of GRPO: equal over the sequence, and 1


def opposing_similarity(
    ids: Int[Tensor, "prompts group seq"],
    table: Float[Tensor, "vocab dim"],
    advantages: Float[Tensor, "prompts group"],
    valid: Bool[Tensor, "prompts group seq"] | None = None,
) -> Float[Tensor, "prompts group seq"]:
    """Mean cosine similarity of each token with those at its position in the members of opposite advantage.

    A member of advantage 0 opposes all others. Padded members do not count. Where no opposing member reaches the
    position, as in a group of one, the similarity is 0: there is nothing to tell apart, and 0 leaves GRPO as it is.
    The cosines are summed before they are multiplied, so the largest tensor is (prompts, group, seq, dim), as large as
    the embeddings of the batch; STAGE measures in the codes of the image tokenizer, where dim is 8.

    Gradient: none.
    """
    alive = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    unit = F.normalize(table.detach().float(), dim=-1, eps=NORM_EPS)[ids.masked_fill(~alive, 0)]
    unit = torch.where(alive[..., None], unit, 0.0)
    sign = advantages.detach().sign()  # a product of small advantages would underflow
    others = ~torch.eye(ids.shape[1], dtype=torch.bool, device=ids.device)
    opposes = ((sign[:, :, None] * sign[:, None, :] <= 0) & others).float()
    total = torch.einsum("pij, pjsd -> pisd", opposes, unit)
    count = torch.einsum("pij, pjs -> pis", opposes, alive.float())
    return torch.where(alive & (count > 0), (unit * total).sum(dim=-1) / count.clamp(min=1), NO_OPPOSITE)


def distinctness(similarity: Float[Tensor, "*axes"]) -> Float[Tensor, "*axes"]:
    """clamp((1 - s) / 2, 0, 1): 1 for a token opposite to those of the opposing samples, 0 for the same token.

    Gradient: none.
    """
    return ((1 - similarity.detach().float()) / 2).clamp(0, 1)


def stage_advantage_weight(
    similarity: Float[Tensor, "batch seq"], valid: Bool[Tensor, "batch seq"] | None = None
) -> Float[Tensor, "batch seq"]:
    """`distinctness` with mean 1 over the valid tokens of each sequence; 0 where not valid.

    STAGE divides by the sum over the sequence and adds the tokens up. TRL's losses take a mean over tokens instead,
    which divides by their number once more; a mean of 1 in place of a sum of 1 makes the two the same, and keeps the
    scale of GRPO. The mean is over all valid tokens, also where only critical ones train.
    A sequence that differs nowhere from its opposites has weight 0 everywhere.

    Gradient: none.
    """
    alive = torch.ones_like(similarity, dtype=torch.bool) if valid is None else valid
    distinct = torch.where(alive, distinctness(similarity), 0.0)
    total, count = distinct.sum(dim=-1, keepdim=True), alive.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, distinct * count / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)


def stage_divergence_weight(similarity: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """1/2 + clamp(1 + s, 0, 1) / 2: 1 unless the token is unlike those of the opposing samples, then down to 1/2.

    Gradient: none.
    """
    return 0.5 + 0.5 * (1 + similarity.detach().float()).clamp(0, 1)
