"""What a rollout keeps of every step: tokens, entropies and log-probabilities, in memory that stays in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..policies.base import Constraint, NextLogits
from .sampling import at_least_fp32, guide, sample_from_logits, sample_from_probabilities, warp

BACKENDS = ("auto", "graph", "eager", "reference")


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``temperature=0`` is greedy. ``batch_size`` bounds the images in flight; 0 means all at once.

    entropy_from: ``guided`` measures the distribution that is sampled from (as released), ``conditional`` the policy's
    own; both at ``temperature`` and before top-k and top-p.
    backend: how a step is run, see `sample`; the images are the same.
    """

    guidance_scale: float = 5.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 0
    entropy_from: Literal["guided", "conditional"] = "guided"
    backend: str = "auto"


class Recorder:
    """Memory for the ``seq`` tokens of ``batch`` images, one row per position: ``(seq, batch)`` each.

    noise decides the tokens, one number in [0, 1) each; ``last`` holds those of the newest step, ``(batch, width)``.
    constraint: which codes each position may hold; None allows all.
    """

    def __init__(self, noise: Float[Tensor, "batch seq"], constraint: Constraint | None = None) -> None:
        self.noise = noise.t().contiguous()
        self.constraint = constraint
        self.tokens = torch.zeros_like(self.noise, dtype=torch.long)
        self.entropy, self.logps = torch.zeros_like(self.noise), torch.zeros_like(self.noise)
        self.last = self.tokens[:1].t().clone(memory_format=torch.contiguous_format)

    def refill(self, noise: Float[Tensor, "batch seq"]) -> None:
        """Put other random numbers into the same memory."""
        self.noise.copy_(noise.t())

    def take(
        self,
        logits: NextLogits,
        positions: Int[Tensor, " width"],
        sampling: Sampling,
        given: Int[Tensor, "batch width"] | None = None,
    ) -> None:
        """Sample the tokens at ``positions``, which lie on the device, and keep what was seen of them.

        given: tokens that stand there already, which are then kept instead of sampled ones.
        """
        noise = self.noise.index_select(0, positions).t()
        allowed = None if self.constraint is None else self.constraint.at(positions)
        tokens, entropy, logps = choose(logits, noise, sampling, allowed, given)
        self.tokens.index_copy_(0, positions, tokens.t())
        self.entropy.index_copy_(0, positions, entropy.t().to(self.entropy.dtype))
        self.logps.index_copy_(0, positions, logps.t().to(self.logps.dtype))
        if tokens.shape == self.last.shape:
            self.last.copy_(tokens)  # in place, because a captured step reads this address
        else:
            self.last = tokens


def choose(
    logits: NextLogits,
    noise: Float[Tensor, "batch width"],
    sampling: Sampling,
    allowed: Bool[Tensor, "width vocab"] | None = None,
    given: Int[Tensor, "batch width"] | None = None,
) -> tuple[Int[Tensor, "batch width"], Float[Tensor, "batch width"], Float[Tensor, "batch width"]]:
    """The next tokens with their entropies and conditional log-probabilities, ``(batch, width)`` each.

    Codes that are not ``allowed`` have probability zero in both distributions. ``given`` tokens are scored as if they
    had been sampled.
    """
    batch, width = noise.shape
    free = None if logits.unconditional is None else logits.unconditional.flatten(0, 1)
    conditional = at_least_fp32(logits.conditional.flatten(0, 1))
    guided = guide(logits.conditional.flatten(0, 1), free, sampling.guidance_scale)
    # A broken unconditional branch spoils the token and not the conditional log-probability, so it is carried over: the
    # sum of logits is finite where all of them are.
    broken = 0 * guided.sum(-1)
    if allowed is not None:
        forbidden = ~allowed.repeat(batch, 1)
        conditional, guided = (each.masked_fill(forbidden, -torch.inf) for each in (conditional, guided))
    temperature = sampling.temperature or 1.0
    conditional, sampled = _over(conditional, temperature), _over(guided, temperature)
    probabilities, log_probs = sampled.softmax(-1), conditional.log_softmax(-1)
    if given is not None:
        tokens = given.flatten()
    else:
        tokens = _sampled(guided, sampled, probabilities, noise.reshape(-1), sampling)
    if sampling.entropy_from == "conditional":
        entropy = _entropy(log_probs.exp(), log_probs, allowed is not None)
    else:
        entropy = _entropy(probabilities, sampled.log_softmax(-1), allowed is not None)
    logps = log_probs.gather(-1, tokens[:, None])[:, 0] + broken
    return tokens.view(batch, width), entropy.view(batch, width), logps.view(batch, width)


def _sampled(guided: Tensor, sampled: Tensor, probabilities: Tensor, noise: Tensor, sampling: Sampling) -> Tensor:
    """One token per row, as ``sampling`` says: greedily, after top-k and top-p, or from the whole distribution."""
    if sampling.temperature == 0:
        return guided.argmax(-1)
    if sampling.top_k or sampling.top_p < 1.0:
        return sample_from_logits(warp(sampled, 1.0, sampling.top_k, sampling.top_p), noise)
    return sample_from_probabilities(probabilities, noise)


def _over(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _entropy(probabilities: Tensor, log_probs: Tensor, constrained: bool) -> Tensor:
    """`objective.signals.entropy` of what is at hand; a logit of -inf that no constraint made stops the rollout."""
    if constrained:
        log_probs = log_probs.clamp(min=torch.finfo(log_probs.dtype).min)  # 0 * -inf is NaN
    return -torch.linalg.vecdot(probabilities, log_probs)
