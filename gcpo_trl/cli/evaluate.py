"""``gcpo evaluate``: a benchmark from model to table, and runs compared. evaluation/README.md says what each needs.

    --out report.json    the report; report.md its table; report/ the pictures, in GenEval's layout

The same command goes on where a stopped one was. Without --out nothing is kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers import JanusVQVAE

from ..evaluation.benchmark import PACKAGE, Benchmark, choose
from ..evaluation.compare import compare, comparison_table, read_reports
from ..evaluation.diversity import FEATURES, choose_gauge
from ..evaluation.diversity import PACKAGE as SPACES
from ..evaluation.folder import Folder, write_whole
from ..evaluation.ground_truth import ground_truth_table
from ..evaluation.ranks import Ranks
from ..evaluation.runner import run, settings_of, write_report
from ..evaluation.scores import MOST_FAILED, footnote, markdown
from ..plugins import available
from ..runs.devices import processes
from .console import say
from .sample import add_model_arguments, load_policy, sampling_of

DEFAULT = "shapes"
SEED = 1234  # plus --seed
INTERRUPTED = 130  # what a shell says of a command that Ctrl-C ended


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    names = ", ".join(available(PACKAGE))
    parser.add_argument("--benchmark", default=DEFAULT, help=f"{names} or my_pkg.mine:benchmark ({DEFAULT})")
    parser.add_argument("--prompts", type=Path, nargs="+", default=[], help="files of prompts, where it has none")
    parser.add_argument("--rewards", nargs="+", default=[], metavar="NAME", help="judge by these instead of its own")
    add_model_arguments(parser)
    parser.add_argument("--images-per-prompt", "--images", type=int, default=None, help="the benchmark's own number")
    parser.add_argument(
        "--diversity",
        nargs="?",
        const=FEATURES,
        metavar="FEATURES",
        help=f"how much a prompt's pictures differ: {', '.join(available(SPACES))} or your own ({FEATURES})",
    )
    parser.add_argument("--limit", type=int, default=None, help="only so many prompts, evenly spaced")
    parser.add_argument("--max-failed", type=float, default=MOST_FAILED, help="share of pictures without a score")
    parser.add_argument("--out", type=Path, default=None, help="report.json; pictures are kept in report/")
    parser.add_argument("--force", action="store_true", help="replace pictures that are there")
    parser.add_argument("--compare", type=Path, nargs="+", default=[], metavar="REPORT", help="compare finished runs")
    parser.add_argument("--ground-truth", action="store_true", help="test the judge of shapes on rendered scenes")


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Load judges and model and open the folder; the returned function evaluates and prints the table."""
    if options.compare:
        reports = read_reports(options.compare)
        return lambda: report_comparison(reports, options)
    check(options)
    if options.ground_truth:
        policy = load_policy(options)
        return lambda: report_ground_truth(policy)
    ranks = this_rank(options)
    benchmark = choose(options.benchmark, options.prompts, options.rewards, options.images_per_prompt, options.limit)
    if options.diversity:
        gauge = choose_gauge(options.diversity, benchmark.images_per_prompt)
        benchmark = dataclasses.replace(benchmark, gauge=gauge)
    policy = load_policy(options)
    seed = SEED + options.seed
    settings = settings_of(policy, benchmark, sampling_of(options), seed, options.model, options.adapter)
    if options.out is None:
        return lambda: evaluate_unkept(policy, benchmark, settings, options)
    folder = Folder(options.out.with_suffix(""), benchmark.images_per_prompt)
    if ranks.rank == 0:
        folder.open(settings, replace=options.force)
    if ranks.world > 1:
        PartialState().wait_for_everyone()
    return lambda: evaluate(policy, benchmark, folder, settings, ranks, options)


def check(options: argparse.Namespace) -> None:
    """Options that cannot work, before anything loads."""
    if options.out is not None and options.out.suffix != ".json":
        raise ValueError(f"--out {options.out} has no ending .json; write --out NAME.json, pictures go to NAME/")
    if options.out is None and options.benchmark != DEFAULT and not options.ground_truth:
        raise ValueError(f"--benchmark {options.benchmark} keeps its pictures; write --out NAME.json")
    if options.out is None and processes() > 1:
        raise ValueError("several processes share their pictures through files; write --out NAME.json")
    if not 0 <= options.max_failed < 1:
        raise ValueError(f"--max-failed {options.max_failed}; write a share of at least 0 and below 1, such as 0.05")


def this_rank(options: argparse.Namespace) -> Ranks:
    """This process among those of ``accelerate launch``, on its own device."""
    if processes() == 1:
        return Ranks()
    state = PartialState(cpu=not torch.cuda.is_available())
    return Ranks(state.process_index, state.num_processes)


def evaluate_unkept(policy: Any, benchmark: Benchmark, settings: dict[str, Any], options: argparse.Namespace) -> int:
    """Evaluate over pictures that are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="gcpo-") as kept:
        folder = Folder(Path(kept), benchmark.images_per_prompt)
        folder.open(settings)
        return evaluate(policy, benchmark, folder, settings, Ranks(), options)


def evaluate(
    policy: Any,
    benchmark: Benchmark,
    folder: Folder,
    settings: dict[str, Any],
    ranks: Ranks,
    options: argparse.Namespace,
) -> int:
    """Draw, judge, print the table, write the report."""
    try:
        report = run(policy, benchmark, folder, settings, ranks, options.max_failed)
    except KeyboardInterrupt:
        if options.out:
            say(f"\nstopped; what is drawn stays in {folder.path}, and the same command goes on")
        return INTERRUPTED
    if ranks.rank == 0:
        say(markdown(report, benchmark.headings))
        say(f"\n{footnote(report)}")
        if options.out:
            write_report(report, benchmark.headings, options.out)
            say(f"report written to {options.out} and {options.out.with_suffix('.md')}, pictures to {folder.path}")
    return 0


def report_ground_truth(policy: Any) -> int:
    """Print how far the judge of shapes can be trusted."""
    say(ground_truth_table(next(part for part in policy.model.modules() if isinstance(part, JanusVQVAE))))
    return 0


def report_comparison(reports: list[dict[str, Any]], options: argparse.Namespace) -> int:
    """Print how runs differ from the first."""
    stems = [file.stem for file in options.compare]
    names = stems if len(set(stems)) == len(stems) else [str(file) for file in options.compare]
    table = comparison_table(names, compare(reports))
    say(table)
    if options.out:
        write_whole(options.out, f"{table}\n".encode())
        say(f"\nwritten to {options.out}")
    return 0
