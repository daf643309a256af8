"""The objective of GCPO (Eq. 8), written out in one place.

    J = 1/G sum_i 1/|o_i| sum_t 1[t critical] ( w_t min(r_t A, clip(r_t, 1 - eps, 1 + eps) A) - beta D_t )

This is the formula to read, the oracle of the tests, and what the analysis evaluates. Training goes through TRL's
own loss, which receives the critical tokens as a mask and w_t A as per-token advantages, so that every loss type,
clipping and normaliser of TRL stays available; tests hold the two equal.

D_t is k3 in the paper, and any penalty of `divergence` here. It is inside the indicator and is not multiplied by w_t.
With divergence_on "all" it leaves the indicator, and is then normalised over the tokens that it is on, all valid ones.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gcpo_trl.objective.divergence import divergence

DIVERGENCE_ON = ("critical", "all")


@dataclass(frozen=True, eq=False)
class LossInputs:
    """What Eq. 8 needs. `old_logps=None` is the first update after a rollout, where the ratio is 1.

    The fields that begin with divergence are those of `divergence`, and `divergence_weight`, its factor of each token.
    """

    logps: Float[Tensor, "batch seq"]
    ref_logps: Float[Tensor, "batch seq"]
    advantages: Float[Tensor, " batch"]
    critical: Bool[Tensor, "batch seq"]
    weight: Float[Tensor, "batch seq"]
    old_logps: Float[Tensor, "batch seq"] | None = None
    valid: Bool[Tensor, "batch seq"] | None = None
    beta: float = 0.01  # GCPO Table 5, Janus-Pro (LlamaGen: 0.04)
    epsilon: float = 0.2  # TRL's and PPO's default; the paper gives none
    normalizer: str = "selected"  # or "sequence"
    divergence: str = "k3"
    divergence_alpha: float = 0.5
    divergence_match: str = "curvature"
    divergence_gradient: str = "pathwise"
    divergence_on: str = "critical"  # or "all"
    divergence_weight: Float[Tensor, "batch seq"] | None = None


@dataclass(frozen=True, eq=False)
class LossOutputs:
    """The scalar to minimise, and detached scalars by metric name."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


def gcpo_loss(inputs: LossInputs) -> LossOutputs:
    """Minus the objective of GCPO Eq. 8.

    normalizer "selected" divides by the number of critical tokens of the whole batch (the authors' code);
    "sequence" divides each row by its length and averages the rows (the paper). At 30 % critical tokens the first is
    about 3.4 times the second, policy and divergence term alike.

    Gradient: flows to logps, and to weight if it was not detached. Not to ref_logps, old_logps, advantages,
    divergence_weight.
    """
    if inputs.normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={inputs.normalizer!r} is unknown; use one of {', '.join(NORMALIZERS)}")
    if inputs.divergence_on not in DIVERGENCE_ON:
        raise ValueError(f"divergence_on={inputs.divergence_on!r} is unknown; use one of {', '.join(DIVERGENCE_ON)}")
    normalized = NORMALIZERS[inputs.normalizer]
    logps, critical = inputs.logps.float(), inputs.critical
    valid = torch.ones_like(critical) if inputs.valid is None else inputs.valid
    old_logps = (inputs.logps if inputs.old_logps is None else inputs.old_logps).detach().float()
    advantages = inputs.advantages.detach().float()[:, None]

    ratio = torch.exp(logps - old_logps)
    clipped_ratio = ratio.clamp(1.0 - inputs.epsilon, 1.0 + inputs.epsilon)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    loss = -normalized(torch.where(critical, inputs.weight.float() * surrogate, 0.0), critical, valid)

    penalized = critical if inputs.divergence_on == "critical" else valid
    penalty = divergence(
        inputs.divergence,
        logps,
        inputs.ref_logps,
        alpha=inputs.divergence_alpha,
        match=inputs.divergence_match,
        gradient=inputs.divergence_gradient,
    )
    factor = 1.0 if inputs.divergence_weight is None else inputs.divergence_weight.detach().float()
    loss = loss + inputs.beta * normalized(torch.where(penalized, factor * penalty, 0.0), penalized, valid)

    metrics = {
        "gcpo/select/fraction": critical.sum() / valid.sum().clamp(min=1),
        "gcpo/weight/mean": _mean_over(critical, inputs.weight.detach().float()),
        f"gcpo/divergence/{inputs.divergence}": _mean_over(penalized, _printed(inputs)),
        "gcpo/policy/clipped_fraction": _mean_over(critical, (clipped_ratio * advantages < ratio * advantages).float()),
    }
    return LossOutputs(loss=loss, metrics=metrics)


def _printed(inputs: LossInputs) -> Float[Tensor, "batch seq"]:
    """The divergence itself, whatever scales it in the loss."""
    name, logps, alpha = inputs.divergence, inputs.logps.detach(), inputs.divergence_alpha
    return divergence(name, logps, inputs.ref_logps, alpha, match="value")


def _per_selected_token(
    objective: Float[Tensor, "batch seq"], critical: Bool[Tensor, "batch seq"], valid: Bool[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    return objective.sum() / critical.sum().clamp(min=1)


def _per_sequence(
    objective: Float[Tensor, "batch seq"], critical: Bool[Tensor, "batch seq"], valid: Bool[Tensor, "batch seq"]
) -> Float[Tensor, ""]:
    return (objective.sum(dim=-1) / valid.sum(dim=-1).clamp(min=1)).mean()


def _mean_over(mask: Bool[Tensor, "batch seq"], values: Float[Tensor, "batch seq"]) -> Float[Tensor, ""]:
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


NORMALIZERS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "selected": _per_selected_token,
    "sequence": _per_sequence,
}
