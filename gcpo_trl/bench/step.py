"""A whole training step: GCPO beside GRPO on the same engine, and where the time goes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..config import GCPOConfig
from ..trainer import GCPOTrainer
from .measure import Report, interleave
from .model import PROMPT, Size, build_policy

FULL = Size(hidden=192, layers=6, heads=6, grid=16, codes=16384, group=4)
QUICK = Size(hidden=32, layers=2, heads=2, grid=6, codes=64, group=2)
ARMS: dict[str, dict[str, Any]] = {
    "GCPO": {},
    "GCPO, gradient through the weight": {"weight_detach": False},
    "GRPO": {"select_strategies": ["everything"], "weight_form": "none"},
}


def spread_of_ids(prompts: Any, completions: Any, completion_ids: Any, **columns: Any) -> list[float]:
    """A reward that costs nothing and differs between images."""
    return [sum(ids) % 97 / 97 for ids in completion_ids]


def run(quick: bool, rounds: int) -> list[Report]:
    """One report."""
    size = QUICK if quick else FULL
    report = Report("step", asdict(size))
    with tempfile.TemporaryDirectory() as folder:
        trainers = {name: _trainer(size, Path(folder) / name.split(",")[0], arm) for name, arm in ARMS.items()}
        interleave(report, {name: _step(trainer) for name, trainer in trainers.items()}, rounds)
    report.compare("GRPO", {"GCPO over GRPO": "GCPO", "GCPO undetached over GRPO": "GCPO, gradient through the weight"})
    for name, trainer in trainers.items():
        entries = [entry for entry in trainer.state.log_history if "gcpo/time/rollout" in entry]
        report.counters |= {
            f"{name}: {key.removeprefix('gcpo/time/')} s": value
            for key, value in entries[-1].items()
            if key.startswith("gcpo/time/")
        }
    return [report]


def _trainer(size: Size, folder: Path, arm: dict[str, Any]) -> GCPOTrainer:
    policy = build_policy(size)
    args = GCPOConfig(
        str(folder),
        per_device_train_batch_size=size.group,
        num_generations=size.group,
        max_steps=1,
        learning_rate=1e-6,
        beta=0.01,
        loss_type="bnpo",
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        **arm,
    )
    dataset = Dataset.from_list([{"prompt": PROMPT}] * size.group)
    trainer = GCPOTrainer(policy.model, spread_of_ids, args, dataset, processing_class=policy.processor)
    for callback in trainer.callback_handler.callbacks[:]:
        if type(callback).__name__ == "PrinterCallback":  # the table is what a benchmark prints
            trainer.remove_callback(callback)
    return trainer


def _step(trainer: GCPOTrainer) -> Callable[[], Any]:
    return lambda: trainer.train()
