"""Samples images token by token and recorders what training needs, holding one step's logits at a time."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from tqdm.auto import tqdm

from ..policies.base import Constraint, FixedState, ImagePolicy, constraint_of
from . import graph
from .recorder import BACKENDS, Recorder, Sampling
from .sampling import uniforms

logger = logging.getLogger(__name__)

PATIENCE = 10.0  # seconds before a rollout shows its progress
KEPT = 2  # loops kept for the next rollout: the batch, and what is left over of the images

# The captured loops of a policy, by shape and sampling. They hold a cache of keys and values each.
_loops: WeakKeyDictionary[Any, dict[Any, graph.FixedLoop]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Rollout:
    """Sampled images as tokens, with what was seen while sampling: ``(batch, seq)`` each.

    entropy: of the distribution named by `Sampling.entropy_from`. logps: conditional log-probability of each token at
    the sampling temperature, without guidance, which is what the policy is trained on. valid: False where the policy
    had no choice, because a constraint allowed one code alone or the token was given; such tokens never train.
    """

    tokens: Int[Tensor, "batch seq"]
    entropy: Float[Tensor, "batch seq"]
    logps: Float[Tensor, "batch seq"]
    valid: Bool[Tensor, "batch seq"]


def sample(
    policy: ImagePolicy,
    prompts: Sequence[Any],
    seed: int,
    indices: Sequence[int],
    sampling: Sampling,
    progress: bool = False,
    given: Int[Tensor, "batch given"] | None = None,
) -> Rollout:
    """One image per prompt; repeated prompts are prefilled once. ``indices`` are the global indices of the samples.

    `Sampling.backend`: ``reference`` is the library's own forward at every token, ``eager`` the fast path, ``graph``
    the fast path as CUDA graphs, ``auto`` graphs where they can be captured and else eager.
    given: the tokens of the first steps, whole steps of `ImagePolicy.widths`, one row per image; sampling continues
    after them with the random numbers that it would have used there anyway.
    ``progress`` shows a bar once the rollout has taken some seconds.
    The model is in evaluation mode meanwhile: dropout would change images, and gradient checkpointing keeps no cache.
    Raises FloatingPointError if the model's logits are not finite, ValueError for graphs where there can be none.
    """
    return joined(list(chunks(policy, prompts, seed, indices, sampling, progress, given)))


def chunks(
    policy: ImagePolicy,
    prompts: Sequence[Any],
    seed: int,
    indices: Sequence[int],
    sampling: Sampling,
    progress: bool = False,
    given: Int[Tensor, "batch given"] | None = None,
) -> Iterator[Rollout]:
    """`sample` in parts of `Sampling.batch_size` images, each as soon as it is finished; its memory is its own.

    Close the iterator where it is not read to its end.
    """
    if len(prompts) != len(indices):
        raise ValueError(f"{len(prompts)} prompts but {len(indices)} sample indices; give one index per prompt")
    _check_given(policy, given, len(prompts))
    sampling = replace(sampling, backend=_resolved(sampling.backend, policy.model.device))
    size = sampling.batch_size or len(prompts)
    total = -(-len(prompts) // size) * policy.num_tokens
    with tqdm(total=total, desc="sampling", unit="token", leave=False, delay=PATIENCE, disable=not progress) as bar:
        for i in range(0, len(prompts), size):
            with _evaluating(policy.model):
                own = None if given is None else given[i : i + size].to(policy.model.device)
                part = _sample_batch(
                    policy, prompts[i : i + size], seed, list(indices[i : i + size]), sampling, bar.update, own
                )
            yield part


def joined(parts: Sequence[Rollout]) -> Rollout:
    """The rollout that these are the parts of."""
    return Rollout(**{f.name: torch.cat([getattr(part, f.name) for part in parts]) for f in fields(Rollout)})


def _check_given(policy: ImagePolicy, given: Tensor | None, images: int) -> None:
    """Raise ValueError unless ``given`` holds the tokens of whole steps, one row per image."""
    if given is None:
        return
    ends = [0, *itertools.accumulate(policy.widths)]
    first = ", ".join(map(str, ends[:6])) + (", ..." if len(ends) > 6 else "")
    if given.dim() != 2 or len(given) != images or given.shape[1] not in ends:
        raise ValueError(
            f"given tokens have shape {tuple(given.shape)} for {images} images; give one row per image, with "
            f"the tokens of whole steps: {first} of {policy.num_tokens}"
        )


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _resolved(backend: str, device: torch.device) -> Any:
    if backend not in BACKENDS:
        raise ValueError(f"rollout_backend={backend!r} is unknown; use one of {', '.join(BACKENDS)}")
    if backend == "graph" and not graph.capturable(device):
        raise ValueError(f"rollout_backend='graph' needs a CUDA device and the model is on {device}; use 'auto'")
    return backend


@torch.no_grad()
def _sample_batch(
    policy: ImagePolicy,
    prompts: Sequence[Any],
    seed: int,
    indices: list[int],
    sampling: Sampling,
    done: Callable[[int], Any],
    given: Tensor | None,
) -> Rollout:
    noise, constraint = uniforms(seed, indices, policy.num_tokens).to(policy.model.device), constraint_of(policy)
    uncaptured = sampling.backend in ("eager", "reference") or given is not None or set(policy.widths) != {1}
    if uncaptured or not graph.capturable(noise.device):
        recorder = _eager(policy, prompts, noise, sampling, constraint, done, given)
    else:
        recorder = _captured(policy, prompts, noise, sampling, constraint, done)
    # Copies, also where a single image would be contiguous as it is: a kept loop writes its recorder again.
    tokens, entropy, logps = (
        part.t().clone(memory_format=torch.contiguous_format)
        for part in (recorder.tokens, recorder.entropy, recorder.logps)
    )
    if not torch.isfinite(logps).all():
        _loops.pop(policy, None)  # their caches would carry it into the next rollout
        bad = int((~torch.isfinite(logps)).any(0).nonzero()[0])
        raise FloatingPointError(f"the image head gave non-finite logits at image token {bad} of {policy.num_tokens}")
    valid = torch.ones_like(tokens, dtype=torch.bool)
    if constraint is not None:
        valid = valid & constraint.chosen()
    if given is not None:
        valid[:, : given.shape[1]] = False
    return Rollout(tokens, entropy, logps, valid)


def _eager(
    policy: ImagePolicy,
    prompts: Sequence[Any],
    noise: Tensor,
    sampling: Sampling,
    constraint: Constraint | None,
    done: Callable[[int], Any],
    given: Tensor | None = None,
) -> Recorder:
    unique, rows = _unique(prompts)
    state, logits = policy.start(
        policy.encode(unique), rows, guided=sampling.guidance_scale != 1.0, plain=sampling.backend == "reference"
    )
    recorder, order = Recorder(noise, constraint), torch.arange(policy.num_tokens, device=noise.device)
    start, known = 0, 0 if given is None else given.shape[1]
    for width in policy.widths:
        if start:
            logits = policy.step(state, recorder.last)
        step = slice(start, start + width)
        recorder.take(logits, order[step], sampling, given[:, step] if given is not None and start < known else None)
        start += width
        done(width)
    return recorder


def _captured(
    policy: ImagePolicy,
    prompts: Sequence[Any],
    noise: Tensor,
    sampling: Sampling,
    constraint: Constraint | None,
    done: Callable[[int], Any],
) -> Recorder:
    """`_eager` through the kept loop of this shape; where a step cannot be captured ``auto`` goes on without."""
    kept, key = _loops.setdefault(policy, {}), (noise.shape, sampling)
    loop = kept.pop(key, None)
    unique, rows = _unique(prompts)
    guided = sampling.guidance_scale != 1.0
    state, logits = policy.start(policy.encode(unique), rows, guided, into=loop.state if loop else None)
    try:
        if not isinstance(state, FixedState):
            raise graph.CaptureError(f"{type(policy).__name__} has no step of fixed shapes")
        loop = loop or graph.FixedLoop(state, noise, sampling, constraint)
        recorder = loop.run(policy, logits, noise, done)
    except graph.CaptureError as error:
        if sampling.backend == "graph":
            raise ValueError(f"rollout_backend='graph', but {error}; use 'eager'") from error
        logger.warning("%s; sampling without graphs", error)
        return _eager(policy, prompts, noise, sampling, constraint, done)
    kept[key] = loop
    while len(kept) > KEPT:
        del kept[next(iter(kept))]
    return recorder


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
