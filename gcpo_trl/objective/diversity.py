"""How much the images of one prompt differ: what reinforcement learning spends while its reward rises.

    disagreement_t = share of the pairs j < k of a group with other tokens at position t
                   = 1 - sum_v n_v (n_v - 1) / (G (G - 1)),   n_v members drew token v
    distance       = mean over the pairs of 1 - cos(f_j, f_k)
    Vendi          = exp(-sum_i l_i ln l_i),   l_i the eigenvalues of K / G, K_jk = cos(f_j, f_k)

The Vendi score (Friedman and Dieng 2022, arXiv:2210.02410) is an effective number of images: 1 where all are equal, G
where all features are orthogonal. Features are whatever somebody computes from a picture; scores in two spaces of them
do not compare.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor


def token_disagreement(tokens: Int[Tensor, "batch seq"], group: int) -> Float[Tensor, "prompts seq"]:
    """Share of the pairs of each group whose tokens differ, by position. Every `group` rows are one group.

    Sorted along the group, the j-th token of a run of equal ones makes j equal pairs, so G log G steps count them all.

    Raises ValueError where there is no pair. Gradient: none.
    """
    if group < 2 or len(tokens) % group:
        raise ValueError(f"{len(tokens)} rows in groups of {group} make no pairs; give whole groups of at least 2")
    ordered = rearrange(tokens, "(prompts group) seq -> prompts group seq", group=group).sort(dim=1).values
    place = torch.arange(group, device=tokens.device)[None, :, None].expand_as(ordered)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    start_of_run = torch.where(begins, place, 0).cummax(dim=1).values
    equal_pairs = (place - start_of_run).sum(dim=1)
    return 1 - equal_pairs / (group * (group - 1) / 2)


def feature_distance(features: Float[Tensor, "prompts group dim"]) -> Float[Tensor, " prompts"]:
    """Mean of 1 - cosine over the pairs of each group, in fp64. Raises ValueError where there is no pair.

    Gradient: none.
    """
    group = features.shape[1]
    if group < 2:
        raise ValueError(f"groups of {group} make no pairs; give at least 2 images of a prompt")
    pairs = torch.ones(group, group, dtype=torch.bool, device=features.device).triu(diagonal=1)
    # Rounding makes the cosine of equal features a last digit above 1.
    return (1 - _cosines(features)[:, pairs].mean(dim=-1)).clamp(min=0)


def vendi_score(features: Float[Tensor, "prompts group dim"]) -> Float[Tensor, " prompts"]:
    """Effective number of images in each group, from 1 to the size of the group, in fp64.

    Gradient: none.
    """
    eigenvalues = torch.linalg.eigvalsh(_cosines(features) / features.shape[1])
    # entr(0) is 0; rounding makes an eigenvalue that is 0 a last digit below it, where entr is minus infinity.
    return torch.special.entr(eigenvalues.clamp(min=0)).sum(dim=-1).exp()


def _cosines(features: Float[Tensor, "prompts group dim"]) -> Float[Tensor, "prompts group group"]:
    unit = F.normalize(features.detach().double(), dim=-1)
    return unit @ unit.transpose(-1, -2)
