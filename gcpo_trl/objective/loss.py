"""The objective of GCPO (Eq. 8), written out in one place.

    J = 1/G sum_i 1/|o_i| sum_t 1[t critical] ( w_t min(r_t A, clip(r_t, 1 - eps, 1 + eps) A) - beta KL_t )

This is the formula to read, the oracle of the tests, and what the analysis evaluates. Training goes through TRL's
own loss, which receives the critical tokens as a mask and w_t A as per-token advantages, so that every loss type,
clipping and normaliser of TRL stays available; tests hold the two equal.

Note that the KL is inside the indicator and is not multiplied by w_t.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LossInputs:
    """What Eq. 8 needs. `old_logps=None` is the first update after a rollout, where the ratio is 1."""

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


@dataclass(frozen=True, eq=False)
class LossOutputs:
    """The scalar to minimise, and detached scalars by metric name."""

    loss: Float[Tensor, ""]
    metrics: dict[str, Tensor]


def k3(logps: Float[Tensor, "batch seq"], ref_logps: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """Per-token estimate of KL(policy || reference), never negative: exp(d) - d - 1 with d = ref_logps - logps.

    Gradient: flows to logps, as 1 - exp(d). Not to ref_logps.
    """
    difference = ref_logps.detach().float() - logps.float()
    return torch.exp(difference) - difference - 1.0


def gcpo_loss(inputs: LossInputs) -> LossOutputs:
    """Minus the objective of GCPO Eq. 8.

    normalizer "selected" divides by the number of critical tokens of the whole batch (the authors' code);
    "sequence" divides each row by its length and averages the rows (the paper). At 30 % critical tokens the first is
    about 3.4 times the second, policy and KL term alike.

    Gradient: flows to logps, and to weight if it was not detached. Not to ref_logps, old_logps, advantages.
    """
    if inputs.normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer={inputs.normalizer!r} is unknown; use one of {', '.join(NORMALIZERS)}")
    logps, critical = inputs.logps.float(), inputs.critical
    valid = torch.ones_like(critical) if inputs.valid is None else inputs.valid
    old_logps = (inputs.logps if inputs.old_logps is None else inputs.old_logps).detach().float()
    advantages = inputs.advantages.detach().float()[:, None]

    ratio = torch.exp(logps - old_logps)
    clipped_ratio = ratio.clamp(1.0 - inputs.epsilon, 1.0 + inputs.epsilon)
    surrogate = torch.minimum(ratio * advantages, clipped_ratio * advantages)
    divergence = k3(logps, inputs.ref_logps)
    objective = inputs.weight.float() * surrogate - inputs.beta * divergence
    loss = -NORMALIZERS[inputs.normalizer](torch.where(critical, objective, 0.0), critical, valid)

    metrics = {
        "gcpo/select/fraction": critical.sum() / valid.sum().clamp(min=1),
        "gcpo/weight/mean": _mean_over(critical, inputs.weight.detach().float()),
        "gcpo/divergence/reverse_kl": _mean_over(critical, divergence.detach()),
        "gcpo/policy/clipped_fraction": _mean_over(critical, (clipped_ratio * advantages < ratio * advantages).float()),
    }
    return LossOutputs(loss=loss, metrics=metrics)


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
