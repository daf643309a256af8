"""How far the policy is from its reference at a sampled token: f-divergence penalties for GRPO.

    u = ref_logps - logps,  w = exp(u) = reference / policy,  penalty g(w), E_policy[g(w)] is the divergence

                     g(w)                                     pathwise: -w g'(w)           unbiased: g - w g'(w)
    reverse_kl       w - u - 1                                1 - w                        -u
    forward_kl       w u - w + 1                              -w u                         1 - w
    jensen_shannon   (w u - (1 + w) log((1 + w) / 2)) / 2     -w log(2 w / (1 + w)) / 2    -log((1 + w) / 2) / 2
    alpha            (w^a - 1 - a (w - 1)) / (a (a - 1))      -w (w^(a-1) - 1) / (a - 1)   -(w^a - 1) / a

The last two columns multiply the gradient of logps. alpha is reverse_kl at a = 0, forward_kl at a = 1, and twice the
squared Hellinger distance at a = 1/2. "k3" is TRL's name for reverse_kl and the same function here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

LOG_RATIO_BOUND = 20.0  # the released code clamps the log-ratio here; exp(20) = 4.9e8

Of = Callable[[Tensor, float], Tensor]  # (u, alpha) -> values of the shape of u


@dataclass(frozen=True)
class Divergence:
    """A divergence as functions of the log-ratio u and of alpha, and ``curvature``, the second derivative g''(1)."""

    value: Of
    pathwise: Of
    unbiased: Of
    curvature: float = 1.0


def divergence(
    name: str,
    logps: Float[Tensor, "batch seq"],
    ref_logps: Float[Tensor, "batch seq"],
    alpha: float = 0.5,
    match: str = "curvature",
    gradient: str = "pathwise",
) -> Float[Tensor, "batch seq"]:
    """Penalty of each sampled token, never negative, in fp32 at least.

    match: "curvature" divides by g''(1), so that one beta means one strength. Near the reference every g is
    g''(1) u^2 / 2, and g''(1) is 1 for all but jensen_shannon, where it is 1/4: at an equal beta it would hold the
    policy a quarter as hard, and a comparison would measure beta instead of the divergence. "value" is g as printed,
    what the released code adds.

    gradient: "pathwise" differentiates g at the sampled token, as GRPO and the released code do. Its expectation is not
    the gradient of E_policy[g], because the samples depend on the policy too: that of reverse_kl is the gradient of the
    forward KL. "unbiased" adds the missing g grad log pi; its expectation is the gradient of the divergence at this
    position, given the tokens before it. The value is the same.

    Where |u| > 20, g is continued by its tangent in u. The released code clamps u: there the gradient is 0, and a token
    that has run away from its reference is no longer pulled back. The tangent keeps the last slope, so value and
    gradient still belong together, and nothing overflows. For a token raised far above its reference (u < -20) it is g
    itself to fp32.

    Gradient: flows to logps, as `shaping`. Not to ref_logps.
    """
    chosen, scale = _chosen(name, alpha, match)
    log_ratio = _log_ratio(logps, ref_logps)
    bounded = log_ratio.clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    slope = -chosen.pathwise(bounded, alpha)  # dg/du = -dg/dlogp
    value = chosen.value(bounded, alpha) + slope * (log_ratio - bounded)
    coefficient = shaping(name, logps, ref_logps, alpha, match, gradient)
    return scale * value + coefficient * (logps - logps.detach())


def shaping(
    name: str,
    logps: Float[Tensor, "batch seq"],
    ref_logps: Float[Tensor, "batch seq"],
    alpha: float = 0.5,
    match: str = "curvature",
    gradient: str = "pathwise",
) -> Float[Tensor, "batch seq"]:
    """What `divergence` multiplies the gradient of each token's log-probability by; positive pushes it down.

    Where |u| > 20 it stays what it is at 20.

    Gradient: none.
    """
    chosen, scale = _chosen(name, alpha, match)
    if gradient not in GRADIENTS:
        raise ValueError(f"gradient={gradient!r} is unknown; use one of {', '.join(GRADIENTS)}")
    bounded = _log_ratio(logps, ref_logps).clamp(-LOG_RATIO_BOUND, LOG_RATIO_BOUND)
    coefficient: Tensor = getattr(chosen, gradient)(bounded, alpha)
    return scale * coefficient


def _chosen(name: str, alpha: float, match: str) -> tuple[Divergence, float]:
    """The divergence and what `match` multiplies it by."""
    if name not in DIVERGENCES:
        raise ValueError(f"divergence={name!r} is unknown; use one of {', '.join(DIVERGENCES)}")
    if match not in MATCHES:
        raise ValueError(f"match={match!r} is unknown; use one of {', '.join(MATCHES)}")
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie in [0, 1]; 0 is reverse_kl, 1 is forward_kl")
    chosen = DIVERGENCES[name]
    return chosen, 1.0 / chosen.curvature if match == "curvature" else 1.0


def _log_ratio(logps: Float[Tensor, "batch seq"], ref_logps: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
    """u, subtracted in fp32 at least: bf16 rounds what a step of training changes to 0."""
    dtype = torch.promote_types(logps.dtype, torch.float32)
    return ref_logps.detach().to(dtype) - logps.detach().to(dtype)


def _power(u: Tensor, exponent: float) -> Tensor:
    """(w^exponent - 1) / exponent, without cancellation; its limit u at exponent 0."""
    return torch.expm1(exponent * u) / exponent if exponent else u


def _log_of_reference_share(u: Tensor) -> Tensor:
    """log(2 w / (1 + w)), exact near u = 0 and without overflow."""
    return -torch.log1p(torch.expm1(-u) / 2)


def _log_of_mean(u: Tensor) -> Tensor:
    """log((1 + w) / 2), exact near u = 0."""
    return torch.log1p(torch.expm1(u) / 2)


def _alpha_value(u: Tensor, a: float) -> Tensor:
    """The formula divides by a (a - 1); each form here divides only by the one of them that is not small."""
    if a < 0.5:
        return (torch.expm1(u) - _power(u, a)) / (1 - a)
    return (torch.exp(u) * _power(u, a - 1) - torch.expm1(u)) / a


REVERSE_KL = Divergence(
    value=lambda u, _: torch.expm1(u) - u,
    pathwise=lambda u, _: -torch.expm1(u),
    unbiased=lambda u, _: -u,
)
FORWARD_KL = Divergence(
    value=lambda u, _: torch.exp(u) * u - torch.expm1(u),
    pathwise=lambda u, _: -torch.exp(u) * u,
    unbiased=lambda u, _: -torch.expm1(u),
)
JENSEN_SHANNON = Divergence(
    # w u - (1 + w) log((1 + w) / 2) with the logarithms of w gathered, which cancel where w is large
    value=lambda u, _: (torch.exp(u) * _log_of_reference_share(u) - _log_of_mean(u)) / 2,
    pathwise=lambda u, _: -torch.exp(u) * _log_of_reference_share(u) / 2,
    unbiased=lambda u, _: -_log_of_mean(u) / 2,
    curvature=0.25,
)
ALPHA = Divergence(
    value=_alpha_value,
    pathwise=lambda u, a: -torch.exp(u) * _power(u, a - 1),
    unbiased=lambda u, a: -_power(u, a),
)

DIVERGENCES: Mapping[str, Divergence] = {
    "k3": REVERSE_KL,
    "reverse_kl": REVERSE_KL,
    "forward_kl": FORWARD_KL,
    "jensen_shannon": JENSEN_SHANNON,
    "alpha": ALPHA,
}
MATCHES = ("curvature", "value")
GRADIENTS = ("pathwise", "unbiased")
