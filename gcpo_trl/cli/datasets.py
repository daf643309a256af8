"""Prompts for a run: the shapes world, a file, or a dataset of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def load_prompts(name: str, split: str, size: int, seed: int) -> Any:
    """A `datasets.Dataset` with a ``prompt`` column; the other columns reach the rewards."""
    from datasets import Dataset, load_dataset

    if name == "shapes":
        from ..shapes.grammar import sample_specs

        return Dataset.from_list([spec.record() for spec in sample_specs(size, seed)])
    path = Path(name)
    if path.suffix in (".txt", *LOADERS) and not path.is_file():
        raise ValueError(f"dataset_name={name!r} is not a file; give an existing file, a hub id or 'shapes'")
    if path.suffix == ".txt":
        prompts = [line.strip() for line in path.read_text().splitlines() if line.strip()]
        return Dataset.from_list([{"prompt": prompt} for prompt in prompts])
    if path.suffix in LOADERS:
        return load_dataset(LOADERS[path.suffix], data_files=str(path), split="train")
    return load_dataset(name, split=split)
