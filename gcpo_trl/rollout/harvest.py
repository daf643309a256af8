"""What a rollout keeps of every step: the token, its entropy and its log-probability, in memory that stays in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..policies.base import NextLogits
from .sampling import draw, draw_from, guide, warp, wide

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


class Harvest:
    """Room for the ``seq`` tokens of ``batch`` images, a row a step: ``(seq, batch)`` each.

    noise decides the tokens, one number in [0, 1) each; ``last`` is the newest token of every image, ``(batch,)``.
    """

    def __init__(self, noise: Float[Tensor, "batch seq"]) -> None:
        self.noise = noise.t().contiguous()
        self.tokens = torch.zeros_like(self.noise, dtype=torch.long)
        self.entropy, self.logps = torch.zeros_like(self.noise), torch.zeros_like(self.noise)
        self.last = self.tokens[0].clone()

    def refill(self, noise: Float[Tensor, "batch seq"]) -> None:
        """Other random numbers in the same memory."""
        self.noise.copy_(noise.t())

    def take(self, logits: NextLogits, position: Int[Tensor, " one"], sampling: Sampling) -> None:
        """Draw the token at ``position``, which lies on the device, and keep what was seen of it."""
        noise = self.noise.index_select(0, position)[0]
        token, entropy, logp = choose(logits, noise, sampling)
        self.tokens.index_copy_(0, position, token[None])
        self.entropy.index_copy_(0, position, entropy[None].to(self.entropy.dtype))
        self.logps.index_copy_(0, position, logp[None].to(self.logps.dtype))
        self.last.copy_(token)


def choose(logits: NextLogits, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """The next token with its entropy and conditional log-probability, ``(batch,)`` each."""
    temperature = sampling.temperature or 1.0
    guided = guide(logits.conditional, logits.unconditional, sampling.guidance_scale)
    conditional = _over(wide(logits.conditional), temperature)
    sampled = _over(guided, temperature)
    probabilities = sampled.softmax(-1)
    if sampling.temperature == 0:
        token = guided.argmax(-1)
    elif sampling.top_k or sampling.top_p < 1.0:
        token = draw(warp(sampled, 1.0, sampling.top_k, sampling.top_p), noise)
    else:
        token = draw_from(probabilities, noise)
    log_probs = conditional.log_softmax(-1)
    if sampling.entropy_from == "conditional":
        entropy = _entropy(log_probs.exp(), log_probs)
    else:
        entropy = _entropy(probabilities, sampled.log_softmax(-1))
    logp = log_probs.gather(-1, token[:, None])[:, 0]
    # A broken unconditional branch spoils the draw and not the conditional log-probability, so it is carried over: the
    # sum of logits is finite where all of them are.
    return token, entropy, logp + 0 * guided.sum(-1)


def _over(logits: Tensor, temperature: float) -> Tensor:
    return logits if temperature == 1.0 else logits / temperature


def _entropy(probabilities: Tensor, log_probs: Tensor) -> Tensor:
    """`objective.signals.entropy` of what is at hand; a logit of -inf stops the rollout anyway."""
    return -torch.linalg.vecdot(probabilities, log_probs)
