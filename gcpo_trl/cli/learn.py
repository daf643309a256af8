"""``gcpo learn``: GRPO, GCPO and its ablations on the shapes world, at equal steps, over paired seeds.

The learning rate of each arm is chosen by the training reward alone, which only sees training prompts; held-out prompts
are looked at once a run, at the end. Every run is one JSON file, so a killed comparison continues where it stopped.

Steps of the tiny model are too small for two threads to share. One run on two cores at once takes half the time:

    OMP_NUM_THREADS=1 accelerate launch --config_file recipes/accelerate/ddp.yaml -m gcpo_trl learn
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scipy import stats

from ..evaluation.shapes import evaluate
from ..rollout import Sampling
from .console import say
from .devices import BATCH_KEY, processes
from .recipe import parse, read_recipe
from .train import build_trainer

PLAIN = {"weight_form": "none"}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "grpo": ("GRPO, all tokens", {"select_strategies": ["everything"], "select_fraction": 1.0} | PLAIN),
    "gcpo": ("GCPO, 30% with weight", {}),
    "gcpo_no_weight": ("GCPO, 30% without weight", PLAIN),
    "random": ("random 30%", {"select_strategies": ["random"], "select_fraction": 0.3} | PLAIN),
    "complement": ("the remaining 70%", {"select_complement": True} | PLAIN),
    "eq7": ("GCPO, Eq. 7 literally, not detached", {"weight_form": "linear", "weight_detach": False}),
    "gcpo_undetached": ("GCPO, weight not detached", {"weight_detach": False}),
    "gcpo_cfg1": ("GCPO, rollouts without guidance", {"rollout_guidance_scale": 1.0}),
}
START, END = "<!-- learn:start -->", "<!-- learn:end -->"
UNGUIDED = ("base", "gcpo", "gcpo_cfg1")  # arms also evaluated without guidance, to answer the question about it
LAST_STEPS = 20  # steps whose training reward chooses the learning rate


@dataclass(frozen=True)
class Plan:
    """What to compare: arms x (one sweep of learning rates, then seeds at the best one)."""

    recipe: Path
    out: Path
    steps: int
    rates: list[float]
    seeds: int
    arms: list[str] = field(default_factory=lambda: list(ARMS))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--recipe", type=Path, default=Path("recipes/shapes_gcpo.yaml"))
    parser.add_argument("--out", type=Path, default=Path("outputs/learn"))
    parser.add_argument("--readme", type=Path, default=Path("recipes/README.md"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 2e-4, 4e-4])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Check the plan; the returned function runs what is missing and writes the table into the README."""
    if START not in options.readme.read_text():
        raise ValueError(f"{options.readme} has no '{START}'; add it and '{END}' where the table belongs")
    return lambda: compare(options)


def compare(options: argparse.Namespace) -> int:
    """Run what is missing, then write the table between its markers in the README."""
    plan = Plan(options.recipe, options.out, options.steps, options.rates, options.seeds, options.arms)
    base = run_once(plan, "base", None, 0)
    results: dict[str, list[dict[str, Any]]] = {}
    for arm in plan.arms:
        sweep = {rate: run_once(plan, arm, rate, 0) for rate in plan.rates}
        best = max(sweep, key=lambda rate: sweep[rate]["train_reward"])
        results[arm] = [sweep[best], *(run_once(plan, arm, best, seed) for seed in range(1, plan.seeds))]
        if is_main():
            text = table(base, results, plan)
            say(text)
            insert(options.readme, text)
    return 0


def is_main() -> bool:
    """Whether this process writes; the others of a launched run train beside it."""
    return os.environ.get("RANK", "0") == "0"


def run_once(plan: Plan, arm: str, rate: float | None, seed: int) -> dict[str, Any]:
    """One run, or its stored result. ``arm="base"`` only evaluates the shipped model."""
    file = plan.out / f"{arm}-lr{rate:g}-steps{plan.steps}-seed{seed}.json" if rate else plan.out / "base.json"
    if file.exists():
        return json.loads(file.read_text())
    run, args, model_args = parse([str(plan.recipe), "--output_dir", str(plan.out / "run"), *overrides(plan, rate)])
    args.seed = args.data_seed = seed
    guidance = args.rollout_guidance_scale
    for key, value in ARMS[arm][1].items() if rate is not None else ():
        setattr(args, key, value)
    args._check_selection()
    trainer, start = build_trainer(run, args, model_args), time.monotonic()
    if rate is not None:
        trainer.train()
    minutes = (time.monotonic() - start) / 60
    rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
    reports = {
        f"{scale:g}": evaluate(
            trainer.policy, Sampling(guidance_scale=scale, batch_size=256 // world), rank=rank, world=world
        )
        for scale in ((guidance, 1.0) if arm in UNGUIDED else (guidance,))
    }
    rewards = [float(entry["reward"]) for entry in trainer.state.log_history if "reward" in entry]
    result = {
        "arm": arm,
        "rate": rate,
        "seed": seed,
        "minutes": minutes,
        "train_reward": statistics.fmean(rewards[-LAST_STEPS:]) if rewards else math.nan,
        "guidance": guidance,
        "images": reports[f"{guidance:g}"].images,
        "scores": {scale: report.overall for scale, report in reports.items()},
        "rewards": rewards,
    }
    if is_main():
        plan.out.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(result))
        partial.rename(file)
        say(f"{file.name}: exact {reports[f'{guidance:g}'].overall['exact']['mean']:.3f} in {minutes:.1f} min")
    trainer.accelerator.wait_for_everyone()  # every process must find the file, or none
    return result


def overrides(plan: Plan, rate: float | None) -> list[str]:
    """What a run changes in the recipe, whose batch is shared by all processes."""
    batch = int(read_recipe(plan.recipe)[BATCH_KEY])
    if batch % processes():
        raise ValueError(f"{BATCH_KEY}={batch} in {plan.recipe} cannot be shared by {processes()} processes")
    words = [f"--{BATCH_KEY}", str(batch // processes())]
    return words if rate is None else [*words, "--learning_rate", str(rate), "--max_steps", str(plan.steps)]


def interval(values: list[float]) -> str:
    """``mean ± half-width`` of the 95% t interval over seeds."""
    if len(values) < 2:
        return f"{values[0]:.3f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.3f} ± {half:.3f}"


def table(base: dict[str, Any], results: dict[str, list[dict[str, Any]]], plan: Plan) -> str:
    """Markdown: a row an arm, with the paired difference to GRPO over seeds."""
    guidance = f"{base['guidance']:g}"

    def values(runs: list[dict[str, Any]], measure: str, scale: str = guidance) -> list[float]:
        return [run["scores"][scale][measure]["mean"] for run in runs]

    lines = [
        "| arm | learning rate | exact | exact - GRPO (paired) | correct | extra objects | exact, guidance 1 |",
        "|---|---|---|---|---|---|---|",
        "| base model | - | "
        + " | ".join(
            [
                f"{base['scores'][guidance]['exact']['mean']:.3f}",
                "-",
                f"{base['scores'][guidance]['correct']['mean']:.3f}",
                f"{base['scores'][guidance]['extra']['mean']:+.3f}",
                f"{base['scores']['1']['exact']['mean']:.3f}",
            ]
        )
        + " |",
    ]
    reference = values(results["grpo"], "exact") if "grpo" in results else None
    for arm, runs in results.items():
        exact = values(runs, "exact")
        paired = "-"
        if reference and arm != "grpo" and len(reference) == len(exact):
            paired = interval([a - b for a, b in zip(exact, reference, strict=True)])
        cells = [
            ARMS[arm][0],
            f"{runs[0]['rate']:g}",
            interval(exact),
            paired,
            interval(values(runs, "correct")),
            interval(values(runs, "extra")),
            interval(values(runs, "exact", "1")) if arm in UNGUIDED else "-",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    minutes = sum(run["minutes"] for runs in results.values() for run in runs)
    lines.append(
        f"\n{plan.steps} steps, {plan.seeds} seeds, mean ± half of the 95% t interval over seeds; evaluation at "
        f"guidance {guidance} on {base['images']:,} images of held-out prompts (standard error of the base model "
        f"{base['scores'][guidance]['exact']['error']:.3f}). Learning rates tried: "
        f"{', '.join(f'{rate:g}' for rate in plan.rates)}. Training of the runs shown: {minutes:.0f} minutes."
    )
    return "\n".join(lines)


def insert(readme: Path, text: str) -> None:
    """Put ``text`` between the markers of ``readme``; raises ValueError if they are missing."""
    page = readme.read_text() if readme.exists() else f"{START}\n{END}\n"
    if START not in page or END not in page:
        raise ValueError(f"{readme} has no '{START}' and '{END}'; add the two lines where the table belongs")
    head, rest = page.split(START)[0], page.split(END)[1]
    partial = readme.with_suffix(".partial")
    partial.write_text(f"{head}{START}\n{text}\n{END}{rest}")
    partial.rename(readme)
