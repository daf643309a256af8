"""What the rollout saw of each token: its entropy (GCPO Eq. 1) and its similarity inside the group (Eq. 5).

    H_t = -sum_k p_tk log p_tk
    S_t = mean over the pairs j < k of a group of cos(e_tj, e_tk)
        = (|sum_j u_tj|^2 - sum_j |u_tj|^2) / (G (G - 1)),   u = e / |e|

The second line of S_t is the same number without the G^2 pairs: expand the square of the sum.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gcpo_trl.objective.layout import Layout

NORM_EPS = 1e-12  # torch.nn.functional.normalize's default; a zero vector keeps cosine 0 with everything


@dataclass(frozen=True, eq=False)
class Signals:
    """What selection may look at, a row per completion. The rows of one group share their similarity.

    entropy     (batch, seq): entropy of the distribution each token was drawn from
    similarity  (batch, seq): mean cosine similarity of the position inside its group
    valid       (batch, seq): True where a token was generated, False on padding
    layout      the grids on which the tokens lie; None for a one-dimensional sequence
    generator   for strategies that sample; one on the CPU gives the same tokens on every device

    Gradient: none.
    """

    entropy: Float[Tensor, "batch seq"]
    similarity: Float[Tensor, "batch seq"]
    valid: Bool[Tensor, "batch seq"]
    layout: Layout | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.layout is not None:
            self.layout.check(self.valid.shape[-1])


class SignalsOnDemand(Signals):
    """Signals of which ``makers``, functions by field name, make those not yet known, each when first read.

    The entropy of a text costs a forward pass, the similarity of a group that spans ranks an exchange; a strategy that
    reads neither pays for neither. Every rank must read the same signals, so a strategy may not let the data decide
    whether it reads one.
    """

    def __init__(
        self,
        makers: Mapping[str, Callable[[], Float[Tensor, "batch seq"]]],
        valid: Bool[Tensor, "batch seq"],
        layout: Layout | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        vars(self).update(makers=makers, valid=valid, layout=layout, generator=generator)
        self.__post_init__()

    def __getattr__(self, name: str) -> Tensor:
        """Called for what the instance does not hold yet."""
        makers = vars(self).get("makers", {})
        if name not in makers:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it makes {', '.join(makers) or 'nothing'}")
        value: Tensor = makers[name]()
        vars(self)[name] = value
        return value


def entropy(logits: Float[Tensor, "*axes vocab"]) -> Float[Tensor, "*axes"]:
    """Shannon entropy in nats of softmax(logits), in fp32 (GCPO Eq. 1).

    A logit of -inf (top-k, a forbidden token) has probability zero and contributes zero.
    fp32 because bf16 steps by 0.03125 between 4 and 8 nats, which ties most gradients of the entropy map.

    Gradient: flows to logits.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    # Masked before the product: 0 * -inf is NaN, and so is its gradient.
    return -(log_probs.exp() * log_probs.masked_fill(log_probs.isneginf(), 0.0)).sum(dim=-1)


def group_similarity(
    embeddings: Float[Tensor, "prompts group seq dim"],
    valid: Bool[Tensor, "prompts group seq"] | None = None,
) -> Float[Tensor, "prompts seq"]:
    """Mean cosine similarity of each position over the pairs of a group (GCPO Eq. 5).

    With `valid`, padded members do not count: the mean is over the pairs of members that reach the position.
    Where there is no pair (a group of one, or one member left) the similarity is 1: a lone member differs from
    nobody, so the position says nothing about diversity, and a strategy that wants low similarity takes it last.

    Gradient: none.
    """
    unit = F.normalize(embeddings.detach().float(), dim=-1, eps=NORM_EPS)
    alive = torch.ones(unit.shape[:-1], dtype=torch.bool, device=unit.device) if valid is None else valid
    unit = torch.where(alive[..., None], unit, 0.0)
    return _mean_over_pairs(unit.sum(dim=1), unit.square().sum(dim=(1, 3)), alive.sum(dim=1))


def group_similarity_from_ids(
    ids: Int[Tensor, "prompts group seq"],
    table: Float[Tensor, "vocab dim"],
    valid: Bool[Tensor, "prompts group seq"] | None = None,
) -> Float[Tensor, "prompts seq"]:
    """`group_similarity(table[ids], valid)` without the (prompts, group, seq, dim) tensor.

    The group is summed while its rows are read, so the largest tensor is (prompts, seq, dim). A group that spans
    ranks can then be gathered as token ids. Ids on padding may be anything.

    Gradient: none.
    """
    table = table.detach().float()
    alive = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    ids = ids.masked_fill(~alive, 0)
    norm = torch.linalg.vector_norm(table, dim=-1)
    inverse = norm.clamp(min=NORM_EPS).reciprocal()
    total = F.embedding_bag(
        rearrange(ids, "prompts group seq -> (prompts seq) group"),
        table,
        per_sample_weights=rearrange(inverse[ids] * alive, "prompts group seq -> (prompts seq) group"),
        mode="sum",
    )
    own = ((norm * inverse).square()[ids] * alive).sum(dim=1)
    total = rearrange(total, "(prompts seq) dim -> prompts seq dim", seq=ids.shape[-1])
    return _mean_over_pairs(total, own, alive.sum(dim=1))


def _mean_over_pairs(
    total: Float[Tensor, "prompts seq dim"],
    own: Float[Tensor, "prompts seq"],
    members: Int[Tensor, "prompts seq"],
) -> Float[Tensor, "prompts seq"]:
    """From the sum of a group's unit vectors and the sum of their squared norms. 1 where there is no pair."""
    # `own` is the number of members unless some embedding is zero; then the count would be wrong.
    pairs = members * (members - 1)
    return torch.where(pairs > 0, (total.square().sum(dim=-1) - own) / pairs.clamp(min=1), 1.0)
