"""Recipes: YAML files of settings, which are valid Python at the same time.

``accelerate launch recipes/shapes_gcpo.yaml`` runs the file with Python. Every ``key: value`` line is an annotation
there and does nothing; the last line, ``launch: object = ...run_recipe(__file__)``, is an assignment, so it is
executed, and starts the run. YAML reads the same line as one more key, which is dropped.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from trl import ModelConfig, TrlParser

from ..config import GCPOConfig
from .devices import BATCH_KEY, accumulation_for, launcher_settings, processes

LAUNCH_KEY = "launch"


@dataclass
class RunArguments:
    """What a run needs beside `GCPOConfig` and TRL's ModelConfig."""

    dataset_name: str = field(
        default="shapes",
        metadata={
            "help": "'shapes', 'geneval-train' (GenEval's tasks without its 553 prompts), a .jsonl, .json, .csv, .tsv, "
            ".parquet or .txt file (one prompt a line), HPSv2's benchmark folder, or a hub id."
        },
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of a hub dataset."})
    dataset_size: int = field(default=4096, metadata={"help": "Prompts drawn for 'shapes' and 'geneval-train'."})
    reward_funcs: list[str] = field(
        default_factory=lambda: ["shapes"],
        metadata={"help": "Rewards: names of files in reward_funcs, or 'package.module:function'."},
    )
    total_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Images an update trains on, over all devices; gradient_accumulation_steps follows from it, so "
            "that a recipe trains alike on any number of GPUs."
        },
    )
    profile: bool = field(
        default=False,
        metadata={
            "help": "Trace the second optimizer step (the first where there is one only) into output_dir/profile, for "
            "Perfetto or chrome://tracing. Around a million events where an image has 576 tokens: for short runs."
        },
    )
    resume: bool = field(default=False, metadata={"help": "Continue from the last complete checkpoint in output_dir."})


def read_recipe(path: str | Path) -> dict[str, Any]:
    """The settings of a recipe file."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no recipe {str(path)!r}; give the path of a YAML file")
    settings = yaml.safe_load(path.read_text())
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds a {type(settings).__name__}; a recipe is a list of 'key: value' lines")
    settings.pop(LAUNCH_KEY, None)
    return settings


def parse(arguments: list[str]) -> tuple[RunArguments, GCPOConfig, ModelConfig]:
    """``[RECIPE] [--key value ...]`` -> settings; the command line overrides the recipe.

    Raises ValueError naming the nearest known key for a key that does not exist.
    """
    arguments = list(arguments)
    if arguments and arguments[0] == "--config":
        arguments.pop(0)
    settings: dict[str, Any] = {}
    if arguments and not arguments[0].startswith("--"):
        settings = read_recipe(arguments.pop(0))
    return parsed(settings, arguments)


def parsed(
    settings: dict[str, Any], arguments: list[str] | None = None, where: str = "the recipe"
) -> tuple[RunArguments, GCPOConfig, ModelConfig]:
    """`parse` of a recipe's settings as they are; ``where`` is what an error calls them."""
    parser = TrlParser((RunArguments, GCPOConfig, ModelConfig))
    known = {action.dest for action in parser._actions} - {"help"}
    settings, arguments = dict(settings), list(arguments or [])
    for key, value in settings.pop("env", {}).items():
        os.environ[key] = str(value)
    check_keys(settings, known, where)
    given = _given(arguments)
    check_keys(set(given) - {"help"}, known | {f"no_{key}" for key in known}, "the command line")
    settings |= launcher_settings(settings | given)
    settings |= _accumulation(settings, given)
    parser.set_defaults_with_config(**settings)
    return parser.parse_args_into_dataclasses(args=arguments)


def _given(arguments: list[str]) -> dict[str, str]:
    """Keys of the command line with their first word: ``--key value``, ``--key=value``, ``--key``."""
    given = {}
    for word, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        if word.startswith("--"):
            key, equals, value = word[2:].partition("=")
            given[key.replace("-", "_")] = value if equals else following
    return given


def _accumulation(recipe: dict[str, Any], given: dict[str, str]) -> dict[str, int]:
    """``gradient_accumulation_steps`` where ``total_batch_size`` decides it; the command line beats the recipe."""
    settings = recipe | given
    if settings.get("total_batch_size") is None:
        return {}
    both = {"total_batch_size", "gradient_accumulation_steps"}
    if "gradient_accumulation_steps" in given or both <= set(recipe):
        raise ValueError("total_batch_size decides gradient_accumulation_steps; leave one of the two out")
    sizes = {key: GCPOConfig.__dataclass_fields__[key].default for key in (BATCH_KEY, "num_generations")}
    per_device, group = (int(settings.get(key, default)) for key, default in sizes.items())
    return {
        "gradient_accumulation_steps": accumulation_for(
            int(settings["total_batch_size"]), per_device, processes(), group
        )
    }


def check_keys(keys: Any, known: set[str], where: str) -> None:
    """Raise ValueError for the first of ``keys`` that is not ``known``, with the nearest that are."""
    for key in sorted(keys):
        if key not in known:
            near = difflib.get_close_matches(key, sorted(known), n=3)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"{where} has an unknown key {key!r}{hint}")
