"""The step of a rollout as a function of nothing but memory, captured as a CUDA graph and replayed a token.

Place, position and the newest token are counted on the device, the cache is read in windows of fixed width, and every
result goes to the same address: so one capture serves all tokens of a window, all rollouts of that shape, and all
weights that an optimizer writes into the same memory. `FixedLoop` is that function and runs anywhere; only `record`
knows CUDA.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..policies.base import Constraint, FixedState, ImagePolicy, NextLogits
from .recorder import Recorder, Sampling

WARM_UPS = 2  # before a capture, so that libraries make their workspaces outside of it


class CaptureError(RuntimeError):
    """The step cannot be captured; the message says why."""


class FixedLoop:
    """Rollouts of one shape on one state, whose memory and graphs stay for the next."""

    def __init__(
        self, state: FixedState, noise: Float[Tensor, "batch seq"], sampling: Sampling, constraint: Constraint | None
    ) -> None:
        self.state = state
        self.sampling = sampling
        self.recorder = Recorder(noise, constraint)
        self.position = torch.zeros(1, dtype=torch.long, device=noise.device)
        self.replays: dict[int, Callable[[], None]] = {}
        self.addresses: list[Any] = []

    def run(
        self,
        policy: ImagePolicy,
        logits: NextLogits,
        noise: Float[Tensor, "batch seq"],
        done: Callable[[int], Any] = lambda _: None,
    ) -> Recorder:
        """Draw all tokens from the prompt's ``logits``; ``done`` is called after each."""
        self.recorder.refill(noise)
        self.position.zero_()
        self._forget_if_moved()
        self._take(logits)
        done(1)
        for position in range(1, policy.num_tokens):
            window = self.state.fix(position)
            if window not in self.replays:
                self.replays[window] = record(lambda: self._step(policy), self._counters())
            self.replays[window]()
            done(1)
        return self.recorder

    def _forget_if_moved(self) -> None:
        """Graphs read addresses: what an optimizer writes in place they see, what was moved they would not."""
        addresses = [(tensor.data_ptr(), tensor.shape, tensor.dtype) for tensor in self.state.storages()]
        if addresses != self.addresses:
            self.replays.clear()
        self.addresses = addresses

    def _counters(self) -> list[Tensor]:
        return [*self.state.counters(), self.position, self.recorder.last]

    def _step(self, policy: ImagePolicy) -> None:
        # Autocast keeps casts of weights until its context ends; a graph would go on reading them.
        with uncached_autocast(self.position.device.type):
            self._take(policy.step(self.state, self.recorder.last))

    def _take(self, logits: NextLogits) -> None:
        self.recorder.take(logits, self.position, self.sampling)
        self.position += 1


def capturable(device: torch.device) -> bool:
    """Whether steps on this device can be captured at all."""
    return device.type == "cuda" and torch.cuda.is_available()


def record(step: Callable[[], None], counters: list[Tensor]) -> Callable[[], None]:
    """Capture ``step``, which may be run before its time: it writes what it will write again, but ``counters`` move.

    Raises CaptureError if something in it cannot be captured.
    """
    before = [counter.clone() for counter in counters]
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    try:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                step()
                for counter, value in zip(counters, before, strict=True):
                    counter.copy_(value)
        torch.cuda.current_stream().wait_stream(stream)
        # Rewards of an earlier chunk may allocate in their own threads meanwhile, which is no business of the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            step()
    except RuntimeError as error:
        raise CaptureError(f"a step of the rollout cannot be captured as a CUDA graph: {error}") from error
    return graph.replay


def uncached_autocast(device: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast that is on, without its cache of weights."""
    if not torch.is_autocast_enabled(device):
        return contextlib.nullcontext()
    return torch.autocast(device, dtype=torch.get_autocast_dtype(device), cache_enabled=False)
