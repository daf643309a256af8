"""Interleaved rounds and deterministic counters: a machine that is busy for a while is busy for all peers alike."""

from __future__ import annotations

import json
import os
import statistics
import time
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that make the host wait for a device; a boolean index is one more, because its result has to be counted.
SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal")
NO_KERNEL = ("_unsafe_view", "empty", "detach", "lift_fresh", "set_", "resize_")  # bookkeeping without arithmetic


@dataclass(frozen=True)
class Timing:
    """CPU seconds of the rounds of one peer, and the wall clock beside them."""

    cpu: list[float]
    wall: list[float]

    @property
    def median(self) -> float:
        """Of CPU seconds, or on a GPU of the wall clock, which there is what one waits for."""
        return statistics.median(self.wall if torch.cuda.is_available() else self.cpu)

    @property
    def spread(self) -> tuple[float, float]:
        """Fastest and slowest round."""
        rounds = self.wall if torch.cuda.is_available() else self.cpu
        return min(rounds), max(rounds)


@dataclass
class Report:
    """One benchmark: what was measured, in which sizes, on what machine."""

    name: str
    sizes: dict[str, Any]
    timings: dict[str, Timing] = field(default_factory=dict)
    counters: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    load: list[float] = field(default_factory=list)

    def compare(self, ours: str, peers: Mapping[str, str]) -> None:
        """Ratios of medians: what each peer takes over what ``ours`` takes."""
        for label, peer in peers.items():
            self.ratios[label] = self.timings[peer].median / self.timings[ours].median

    def table(self) -> str:
        """For a terminal and for a README alike."""
        lines = [f"### {self.name}", "", ", ".join(f"{key} {value}" for key, value in self.sizes.items()), ""]
        if self.timings:
            lines += ["| | median s | fastest to slowest | wall s |", "|---|---|---|---|"]
        for name, timing in self.timings.items():
            low, high = timing.spread
            wall = statistics.median(timing.wall)
            lines.append(f"| {name} | {timing.median:.4g} | {low:.4g} to {high:.4g} | {wall:.4g} |")
        if self.timings:
            lines.append("")
        values = {**{f"ratio: {key}": value for key, value in self.ratios.items()}, **self.counters}
        lines += ["| | |", "|---|---|", *(f"| {key} | {value:.4g} |" for key, value in values.items())]
        return "\n".join([*lines, "", f"load average while measuring: {self.load[0]:.1f} to {self.load[1]:.1f}", ""])


def to_json(reports: list[Report]) -> str:
    """All reports with the machine they ran on."""
    machine = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    return json.dumps({"machine": machine, "reports": [asdict(report) for report in reports]}, indent=2)


def interleave(report: Report, peers: Mapping[str, Callable[[], Any]], rounds: int) -> None:
    """Time every peer once a round, after one round that does not count. Results go into ``report``."""
    for function in peers.values():
        function()
    cpu: dict[str, list[float]] = {name: [] for name in peers}
    wall: dict[str, list[float]] = {name: [] for name in peers}
    loads = [os.getloadavg()[0]]
    for _ in range(rounds):
        for name, function in peers.items():
            _wait()
            start, busy = time.perf_counter(), time.process_time()
            function()
            _wait()
            cpu[name].append(time.process_time() - busy)
            wall[name].append(time.perf_counter() - start)
        loads.append(os.getloadavg()[0])
    report.load = [min(loads), max(loads)]
    report.timings |= {name: Timing(cpu[name], wall[name]) for name in peers}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Operations(TorchDispatchMode):
    """Counts operations that are no view, those that wait for the device, and the bytes of what stays alive."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.syncs = 0
        self._made: list[tuple[Any, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if not func.is_view and name not in NO_KERNEL:
            self.kernels[name] += 1
        boolean = name == "index" and any(t is not None and t.dtype == torch.bool for t in args[1])
        self.syncs += name in SYNCS or boolean
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.dim():
                self._made.append((weakref.ref(tensor), tensor.shape[-1], tensor.nbytes))
        return result

    def alive(self, vocab: int) -> int:
        """Bytes of tensors ``(..., vocab)`` made since the start and not let go."""
        return sum(size for made, last, size in self._made if last == vocab and made() is not None)


def peak_bytes(function: Callable[[], Any]) -> int:
    """Most memory that ``function`` holds at once beyond what was there before it, as torch's allocator counts it."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        floor = torch.cuda.memory_allocated()
        function()
        return torch.cuda.max_memory_allocated() - floor
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        function()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
