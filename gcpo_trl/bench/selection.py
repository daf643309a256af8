"""Choosing the critical tokens of one group: the vectorised signals and strategies, and the same cell by cell."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..objective.layout import Layout
from ..objective.selection import critical_tokens
from ..objective.signals import Signals, group_similarity_from_ids
from . import naive
from .measure import Report, interleave

FRACTION = 0.1  # published
STRATEGIES = ("initial", "entropy_gradient", "similarity")


@dataclass(frozen=True)
class Size:
    """``group`` images of ``side`` squared tokens, of ``codes`` kinds embedded in ``dim``."""

    dim: int
    codes: int
    group: int
    side: int


FULL = Size(dim=2048, codes=16384, group=8, side=24)
QUICK = Size(dim=32, codes=64, group=2, side=6)


def run(quick: bool, rounds: int) -> list[Report]:
    """One report."""
    size = QUICK if quick else FULL
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(size.codes, size.dim, generator=generator)
    ids = torch.randint(size.codes, (size.group, size.side**2), generator=generator)
    entropy = torch.rand(size.group, size.side, size.side, generator=generator)

    def vectorised() -> Any:
        used, rows = ids.unique(return_inverse=True)  # as the trainer does
        similarity = group_similarity_from_ids(rows[None], table[used]).expand(size.group, -1)
        valid = torch.ones_like(ids, dtype=torch.bool)
        signals = Signals(entropy.flatten(1), similarity, valid, Layout.raster(size.side, size.side))
        return critical_tokens(signals, STRATEGIES, FRACTION)

    report = Report("selection", asdict(size))
    peers = {"vectorised": vectorised, "cell by cell": lambda: naive.select(entropy, table[ids], FRACTION)}
    interleave(report, peers, rounds)
    report.compare("vectorised", {"cell by cell": "cell by cell"})
    return [report]
