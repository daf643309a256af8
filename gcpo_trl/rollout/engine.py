"""Samples images token by token and harvests what training needs, holding one step's logits at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..objective.signals import entropy
from ..policies.base import ImagePolicy, NextLogits
from .sampling import draw, guide, uniforms, warp


@dataclass(frozen=True)
class Sampling:
    """How to sample. ``temperature=0`` is greedy. ``batch_size`` bounds the images in flight; 0 means all at once.

    entropy_from: ``guided`` measures the distribution that is sampled from (as released), ``conditional`` the policy's
    own; both at ``temperature`` and before top-k and top-p.
    """

    guidance_scale: float = 5.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    batch_size: int = 0
    entropy_from: Literal["guided", "conditional"] = "guided"


@dataclass(frozen=True)
class Rollout:
    """Sampled images as tokens, with what was seen while sampling: ``(batch, seq)`` each.

    entropy: of the distribution named by `Sampling.entropy_from`. logps: conditional log-probability of each token at
    the sampling temperature, without guidance, which is what the policy is trained on.
    """

    tokens: Int[Tensor, "batch seq"]
    entropy: Float[Tensor, "batch seq"]
    logps: Float[Tensor, "batch seq"]


def sample(
    policy: ImagePolicy, prompts: Sequence[Any], seed: int, indices: Sequence[int], sampling: Sampling
) -> Rollout:
    """One image a prompt; repeated prompts are prefilled once. ``indices`` are the global indices of the samples.

    The model is in evaluation mode meanwhile: dropout would change images, and gradient checkpointing keeps no cache.
    Raises FloatingPointError if the model's logits are not finite.
    """
    if len(prompts) != len(indices):
        raise ValueError(f"{len(prompts)} prompts but {len(indices)} sample indices; give one index a prompt")
    size = sampling.batch_size or len(prompts)
    training = policy.model.training
    policy.model.eval()
    try:
        parts = [
            _sample_batch(policy, prompts[i : i + size], seed, list(indices[i : i + size]), sampling)
            for i in range(0, len(prompts), size)
        ]
    finally:
        policy.model.train(training)
    return Rollout(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Rollout)})


@torch.no_grad()
def _sample_batch(
    policy: ImagePolicy, prompts: Sequence[Any], seed: int, indices: list[int], sampling: Sampling
) -> Rollout:
    unique, rows = _unique(prompts)
    state, logits = policy.start(policy.encode(unique), rows, guided=sampling.guidance_scale != 1.0)
    noise = uniforms(seed, indices, policy.num_tokens).to(logits.conditional.device)
    tokens = noise.new_empty(noise.shape, dtype=torch.long)
    entropies, logps = torch.empty_like(noise), torch.empty_like(noise)
    for position in range(policy.num_tokens):
        if position:
            logits = policy.step(state, tokens[:, position - 1])
        chosen, entropies[:, position], logps[:, position] = _choose(logits, noise[:, position], sampling)
        tokens[:, position] = chosen
    if not torch.isfinite(logps).all():
        bad = int((~torch.isfinite(logps)).any(0).nonzero()[0])
        raise FloatingPointError(f"the image head gave non-finite logits at image token {bad} of {policy.num_tokens}")
    return Rollout(tokens, entropies, logps)


def _choose(logits: NextLogits, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor, Tensor]:
    """The next token with its entropy and conditional log-probability, ``(batch,)`` each."""
    temperature = sampling.temperature or 1.0
    guided = guide(logits.conditional, logits.unconditional, sampling.guidance_scale)
    conditional = logits.conditional.float() / temperature
    if sampling.temperature == 0:
        chosen = guided.argmax(-1)
    else:
        chosen = draw(warp(guided, temperature, sampling.top_k, sampling.top_p), noise)
    seen = guided / temperature if sampling.entropy_from == "guided" else conditional
    logp = conditional.log_softmax(-1).gather(-1, chosen[:, None])[:, 0]
    # A broken unconditional branch spoils the draw and not the conditional log-probability, so it is carried over.
    return chosen, entropy(seen), logp.where(guided.isfinite().all(-1), torch.nan)


def _unique(prompts: Sequence[Any]) -> tuple[list[Any], Tensor]:
    """Distinct prompts in order of appearance, and for each prompt its index among them."""
    first: dict[str, int] = {}
    unique: list[Any] = []
    rows = []
    for prompt in prompts:
        key = repr(prompt)
        if key not in first:
            first[key] = len(unique)
            unique.append(prompt)
        rows.append(first[key])
    return unique, torch.tensor(rows)
