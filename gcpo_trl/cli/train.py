"""``gcpo train RECIPE [--key value]``: build a trainer from settings and run it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..runs.build import build_trainer
from ..runs.recipe import parse
from ..trainer.resume import last_whole_checkpoint


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Parse, check and build; the returned function trains and saves model and processor to ``output_dir``."""
    run, args, model_args = parse(arguments)
    trainer = build_trainer(run, args, model_args)

    def train() -> int:
        last = last_whole_checkpoint(Path(args.output_dir)) if run.resume else None
        trainer.train(resume_from_checkpoint=str(last) if last else None)
        trainer.save_model(args.output_dir)
        return 0

    return train
