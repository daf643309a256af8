"""``gcpo demo``: train on the shapes world as a recipe says, and show on held-out prompts what was learnt."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..analysis.pictures import grid, learning_curve, overlay_sheet
from ..evaluation.shapes import evaluate
from ..objective.selection import critical_tokens
from ..objective.signals import Signals, group_similarity_from_ids
from ..rollout import Sampling, sample
from ..runs.build import build_trainer
from ..runs.recipe import parse
from ..shapes.grammar import TASKS, split_specs
from .console import say

CURVES = {"reward": "training reward", "gcpo/entropy/all": "token entropy (nats)", "kl": "KL to the base model"}
SHOWN_A_TASK = 1
IMAGES_A_ROW = 4
GROUP = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("--recipe", type=Path, default=Path("recipes/shapes_gcpo.yaml"))
    parser.add_argument("--out", type=Path, default=Path("outputs/demo"))
    parser.add_argument("--steps", type=int, default=None, help="training steps; default: the recipe's")
    parser.add_argument("--images", type=int, default=6, help="evaluation images a held-out prompt")


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Build the trainer; the returned function evaluates, trains, evaluates again and draws."""
    overrides = ["--max_steps", str(options.steps)] if options.steps else []
    run, args, model_args = parse([str(options.recipe), "--output_dir", str(options.out / "model"), *overrides])
    trainer = build_trainer(run, args, model_args)
    return lambda: show(trainer, options)


def show(trainer: Any, options: argparse.Namespace) -> int:
    """Evaluate, train, evaluate again, draw."""
    start, args, policy = time.monotonic(), trainer.args, trainer.policy
    sampling = Sampling(guidance_scale=args.rollout_guidance_scale, batch_size=256)

    say("Held-out prompts before training:")
    before = evaluate(policy, sampling, images_per_prompt=options.images)
    say(before.table())
    shown = shown_prompts()
    first = draw(policy, shown, sampling)

    say(f"\nTraining {args.max_steps} steps on captions that share no canonical key with these:")
    trainer.train()
    trainer.save_model(args.output_dir)

    say("\nHeld-out prompts after training:")
    after = evaluate(policy, sampling, images_per_prompt=options.images)
    say(after.table())
    files = write_pictures(options.out, trainer, shown, first, draw(policy, shown, sampling), sampling)
    summary = {"before": json.loads(before.to_json()), "after": json.loads(after.to_json())}
    (options.out / "scores.json").write_text(json.dumps(summary, indent=2))
    gain = after.overall["exact"]["mean"] - before.overall["exact"]["mean"]
    error = (after.overall["exact"]["error"] ** 2 + before.overall["exact"]["error"] ** 2) ** 0.5
    say(f"\nexact, overall: {gain:+.3f} ± {error:.3f} in {(time.monotonic() - start) / 60:.1f} minutes")
    for file in [*files, options.out / "scores.json"]:
        say(f"  {file}")
    return 0


def shown_prompts() -> list[str]:
    """One held-out prompt of each task."""
    return [spec.prompt for task in TASKS for spec in split_specs(task)[1][:SHOWN_A_TASK]]


def draw(policy: Any, prompts: list[str], sampling: Sampling) -> list[list[Any]]:
    """A row of pictures a prompt, always from the same seeds."""
    repeated = [prompt for prompt in prompts for _ in range(IMAGES_A_ROW)]
    images = policy.decode(sample(policy, repeated, 99, list(range(len(repeated))), sampling).tokens)
    return [images[i : i + IMAGES_A_ROW] for i in range(0, len(images), IMAGES_A_ROW)]


def write_pictures(
    out: Path, trainer: Any, prompts: list[str], first: list[list[Any]], last: list[list[Any]], sampling: Sampling
) -> list[Path]:
    """Learning curve, before/after grid, critical tokens; returns their paths."""
    files = [out / name for name in ("learning_curve.png", "before_after.png", "critical_tokens.png")]
    out.mkdir(parents=True, exist_ok=True)
    present = {key for entry in trainer.state.log_history for key in entry}
    learning_curve(trainer.state.log_history, files[0], {k: v for k, v in CURVES.items() if k in present})
    rows = [old + new for old, new in zip(first, last, strict=True)]
    grid(rows, prompts, columns=["before"] + [""] * (IMAGES_A_ROW - 1) + ["after"]).save(files[1])
    critical_picture(trainer, prompts[1::2], sampling).save(files[2])
    return files


def critical_picture(trainer: Any, prompts: list[str], sampling: Sampling) -> Any:
    """One image of a fresh group for each prompt, its critical tokens tinted by the strategy that chose them."""
    policy, args = trainer.policy, trainer.args
    repeated = [prompt for prompt in prompts for _ in range(GROUP)]
    rollout = sample(policy, repeated, 7, list(range(len(repeated))), sampling)
    ids = rollout.tokens.view(len(prompts), GROUP, -1)
    similarity = group_similarity_from_ids(ids, policy.token_table(args.select_similarity_space))
    signals = Signals(
        rollout.entropy,
        similarity.repeat_interleave(GROUP, dim=0),
        torch.ones_like(rollout.tokens, dtype=torch.bool),
        policy.layout,
        torch.Generator().manual_seed(0),
    )
    masks = critical_tokens(
        signals,
        args.select_strategies,
        args.select_fraction,
        args.select_combine,
        tuple(args.select_window),
        smoothing=args.select_smoothing,
    )
    masks = {name: mask[::GROUP] for name, mask in masks.items() if name != "critical"}
    return overlay_sheet(policy.decode(rollout.tokens[::GROUP]), masks, policy.layout, prompts)
