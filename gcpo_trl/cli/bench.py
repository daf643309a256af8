"""``gcpo bench``: speed and memory beside a peer in the same run, as tables and one JSON file."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from pathlib import Path

import torch

from ..bench.measure import to_json
from .console import say

ROOMS = ("rollout", "loss", "selection", "step", "scale")
ROUNDS = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("what", nargs="*", metavar="|".join(ROOMS), help="which benchmarks; default: all of them")
    parser.add_argument("--json", type=Path, default=None, help="write all numbers there")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="interleaved rounds; the medians are reported")
    parser.add_argument("--quick", action="store_true", help="sizes that only show that it runs")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Check the names; the returned function measures."""
    for name in options.what:
        if name not in ROOMS:
            raise ValueError(f"there is no benchmark {name!r}; choose from {', '.join(ROOMS)}")
    if options.rounds < 1:
        raise ValueError(f"--rounds {options.rounds} measures nothing; take at least 1, for a table {ROUNDS}")
    return lambda: measure(options)


def measure(options: argparse.Namespace) -> int:
    """Run the benchmarks one after the other and print a table each."""
    torch.set_num_threads(options.threads)
    reports = []
    for name in options.what or ROOMS:
        for report in importlib.import_module(f"..bench.{name}", __package__).run(options.quick, options.rounds):
            reports.append(report)
            say(report.table())
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(to_json(reports))
        say(f"written to {options.json}")
    return 0
