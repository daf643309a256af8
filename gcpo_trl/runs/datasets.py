"""Prompts for a run: drawn from the shapes world or in GenEval's grammar, from a file, or a dataset of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..prompts import files, generate, load


def load_prompts(name: str, split: str, size: int, seed: int) -> Any:
    """A `datasets.Dataset` with a ``prompt`` column; the other columns reach the rewards.

    size, seed: of the prompts that are drawn, ``shapes`` and ``geneval-train``. split: of a hub dataset.
    """
    from datasets import Dataset, load_dataset

    if name == "shapes":
        from ..shapes.grammar import sample_specs

        return Dataset.from_list([spec.record() for spec in sample_specs(size, seed)])
    if name == "geneval-train":
        return Dataset.from_list(generate(size, seed).rows)
    if name == "geneval":
        raise ValueError("dataset_name='geneval' is the benchmark itself; train on 'geneval-train', which avoids it")
    path = Path(name)
    parquet = path.suffix == ".parquet"
    if (parquet or path.suffix.lower() in files.READERS) and not path.is_file():
        raise ValueError(
            f"dataset_name={name!r} is not a file; give an existing file, a hub id, 'shapes' or 'geneval-train'"
        )
    if parquet:
        return load_dataset("parquet", data_files=str(path), split="train")
    if files.readable(path):
        return Dataset.from_list(load(path))
    return load_dataset(name, split=split)
