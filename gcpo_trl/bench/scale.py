"""How a rollout grows with the group, the tokens of an image and the image vocabulary: one axis at a time."""

from __future__ import annotations

from dataclasses import asdict, replace

from ..rollout import Sampling, sample
from .measure import Report, interleave
from .model import Size, build_policy, prompts_of

BASE = Size(hidden=256, layers=6, heads=4, grid=12, codes=4096, group=8)
AXES = {"group": (2, 4, 8, 16, 32), "grid": (8, 12, 16, 24), "codes": (4096, 16384, 65536)}
QUICK_BASE = Size(hidden=32, layers=2, heads=2, grid=4, codes=64, group=2)
QUICK_AXES = {"group": (2, 4), "grid": (3, 4), "codes": (64, 128)}


def run(quick: bool, rounds: int) -> list[Report]:
    """A report an axis: seconds a rollout, and each size over the first."""
    base, axes = (QUICK_BASE, QUICK_AXES) if quick else (BASE, AXES)
    return [_axis(base, axis, values, rounds) for axis, values in axes.items()]


def _axis(base: Size, axis: str, values: tuple[int, ...], rounds: int) -> Report:
    report = Report(f"scale, {axis}", {key: value for key, value in asdict(base).items() if key != axis})
    peers = {}
    for value in values:
        size = replace(base, **{axis: value})
        policy, prompts = build_policy(size), prompts_of(size)
        peers[f"{axis} {value}"] = lambda policy=policy, prompts=prompts: sample(
            policy, prompts, 0, list(range(len(prompts))), Sampling()
        )
    interleave(report, peers, rounds)
    first = f"{axis} {values[0]}"
    report.compare(first, {f"{axis} {value} over {values[0]}": f"{axis} {value}" for value in values[1:]})
    return report
