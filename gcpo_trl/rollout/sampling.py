"""One sampling step: guide, warp, sample. Pure functions on logits ``(batch, vocab)``."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def guide(
    conditional: Float[Tensor, "batch vocab"], unconditional: Float[Tensor, "batch vocab"] | None, scale: float
) -> Float[Tensor, "batch vocab"]:
    """Classifier-free guidance as LlamaGen and Janus write it, ``u + scale * (c - u)``, in fp32; 1 is no guidance."""
    if unconditional is None:
        return at_least_fp32(conditional)
    return at_least_fp32(unconditional) + scale * (at_least_fp32(conditional) - at_least_fp32(unconditional))


def warp(
    logits: Float[Tensor, "batch vocab"], temperature: float, top_k: int = 0, top_p: float = 1.0
) -> Float[Tensor, "batch vocab"]:
    """Temperature, then top-k, then top-p, in transformers' order; excluded logits become -inf. 0 and 1 switch off."""
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # A token stays while the mass before it is below top_p, so the best one always stays.
        logits = logits.masked_fill((before >= top_p).gather(-1, order.argsort(-1)), -torch.inf)
    return logits


def sample_from_logits(logits: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Inverse-CDF sampling: the first token whose cumulative probability exceeds ``uniform`` in [0, 1).

    One number a row decides the token, so a row's tokens depend on nothing but its logits and its own generator.
    """
    return sample_from_probabilities(logits.softmax(-1), uniform)


def sample_from_probabilities(
    probabilities: Float[Tensor, "batch vocab"], uniform: Float[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """`sample_from_logits` of probabilities, summed in fp64: fp32 would lose rare tokens of a large vocabulary."""
    cumulative = probabilities.double().cumsum(-1)  # on a CPU a fifth of the time of cumsum's own dtype
    target = uniform.double()[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=probabilities.shape[-1] - 1)


def at_least_fp32(logits: Tensor) -> Tensor:
    """fp32 for half precisions; fp32 and fp64 as they are."""
    return logits if logits.dtype in (torch.float32, torch.float64) else logits.float()


def uniforms(seed: int, indices: list[int], count: int) -> Float[Tensor, "batch count"]:
    """Random numbers in [0, 1) for samples known by their global index: one CPU generator each.

    The same on every device and however samples are split into batches or ranks.
    """
    generator = torch.Generator()
    rows = []
    for index in indices:
        generator.manual_seed((seed * 1_000_003 + index) % 2**63)
        # Not the default dtype, which a reward may lend to the whole process while it loads a model.
        rows.append(torch.rand(count, generator=generator, dtype=torch.float32))
    return torch.stack(rows)
