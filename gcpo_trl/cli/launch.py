"""What the last line of a recipe calls when Python runs the file, as ``accelerate launch recipe.yaml`` does."""

from __future__ import annotations

import sys

from .main import main


def run_recipe(path: str) -> None:
    """Train as the recipe at ``path`` says, with the command line's ``--key value`` on top; never returns."""
    raise SystemExit(main(["train", path, *sys.argv[1:]]))
