"""``gcpo evaluate``: the shapes benchmark on held-out prompts, as a table and one JSON file."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..evaluation.ground_truth import ground_truth_table
from ..evaluation.shapes import IMAGES_A_PROMPT, evaluate
from .console import say
from .sample import add_model_arguments, load_policy, sampling_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_model_arguments(parser)
    parser.add_argument("--images", type=int, default=IMAGES_A_PROMPT, help="images a prompt")
    parser.add_argument("--ground-truth", action="store_true", help="test the judge on rendered scenes instead")
    parser.add_argument("--out", type=Path, default=None, help="write the report as JSON")


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Load the model; the returned function evaluates it and prints the table."""
    policy = load_policy(options)
    return lambda: report_scores(policy, options)


def report_scores(policy: Any, options: argparse.Namespace) -> int:
    """Evaluate and print the table."""
    if options.ground_truth:
        say(ground_truth_table(policy.model.model.vqmodel))
        return 0
    report = evaluate(policy, sampling_of(options), images_a_prompt=options.images, seed=1234 + options.seed)
    say(report.table())
    say(f"\n{report.images} images, guidance {options.guidance_scale:g}, mean ± standard error over prompts")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(report.to_json())
        say(f"report written to {options.out}")
    return 0
