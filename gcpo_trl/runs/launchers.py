"""What the doctor asks of whatever started this process: engines and processes that are dropped without a word."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .findings import Finding

logger = logging.getLogger(__name__)

LONGEST_BUILD = 1800  # seconds


def accelerate_defaults() -> dict[str, Any]:
    """What ``accelerate config`` saved on this machine; empty if it was never run."""
    import yaml
    from accelerate.commands.config.config_args import default_config_file

    file = Path(default_config_file)
    return yaml.safe_load(file.read_text()) or {} if file.is_file() else {}  # JSON is YAML


def launcher_words() -> list[str]:
    """The command line of the ``accelerate launch`` that started this process; empty if none did."""
    import psutil

    for parent in psutil.Process().parents():
        try:
            words = parent.cmdline()
        except psutil.Error as error:
            logger.debug("the command line of process %s cannot be read: %s", parent.pid, error)
            continue
        if "launch" in words and any("accelerate" in Path(word).name for word in words[: words.index("launch")]):
            return words
    return []


def _on(value: Any) -> bool:
    return str(value).lower() in ("1", "true", "yes", "on", "y", "t")


def check_deepspeed_on_cpu(env: Mapping[str, str]) -> Finding:
    """accelerate prefers ACCELERATE_USE_CPU to DeepSpeed, and says nothing (accelerate/state.py, PartialState)."""
    defaults, words = accelerate_defaults(), launcher_words()
    asked = (
        _on(env.get("ACCELERATE_USE_DEEPSPEED"))
        or "--use_deepspeed" in words
        or defaults.get("distributed_type") == "DEEPSPEED"
    )
    cpu = _on(env.get("ACCELERATE_USE_CPU")) or "--cpu" in words or bool(defaults.get("use_cpu"))
    if asked and cpu:
        seen = "asked for together with the CPU, so accelerate leaves it out and runs DDP or one process"
        return Finding("warn", "DeepSpeed", f"{seen}; unset ACCELERATE_USE_CPU, --cpu or use_cpu")
    return Finding("ok", "DeepSpeed", "asked for, not on the CPU" if asked else "not asked for")


def check_build_locks(env: Mapping[str, str]) -> Finding:
    """torch compiles DeepSpeed's operators behind a lock, which a killed run leaves; the next one waits for ever."""
    from torch.utils.cpp_extension import get_default_build_root

    root = Path(env.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    old = [lock for lock in root.rglob("lock") if time.time() - lock.stat().st_mtime > LONGEST_BUILD]
    if old:
        seen = f"{', '.join(map(str, old))} is older than {LONGEST_BUILD // 60} minutes, so what made it is gone"
        return Finding("warn", "compiled ops", f"{seen}; delete it, or runs with DeepSpeed wait for it and never start")
    return Finding("ok", "compiled ops", "no lock of a build that was killed")


def check_processes(env: Mapping[str, str]) -> Finding:
    """``accelerate launch --cpu --num_processes 2`` starts one process: `simple_launcher` of accelerate's launch.py."""
    defaults, words = accelerate_defaults(), launcher_words()
    cpu = "--cpu" in words or bool(defaults.get("use_cpu"))
    count = int(_value(words, "num_processes") or defaults.get("num_processes") or 1)
    started = int(env.get("WORLD_SIZE", 1))
    if cpu and count > 1 and started == 1 and not _value(words, "mpirun_hostfile"):
        seen = f"accelerate launch on the CPU with {count} processes starts one"
        return Finding("warn", "processes", f"{seen}; use torchrun --nproc_per_node {count} -m gcpo_trl RECIPE.yaml")
    return Finding("ok", "processes", f"{started}")


def _value(words: list[str], key: str) -> str | None:
    """The value behind ``--key`` or in ``--key=value``, with hyphens or underscores; None if it is not there."""
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name.replace("-", "_") == key:
            return value if equals else following
    return None


def check_rendezvous(env: Mapping[str, str]) -> Finding:
    """A WORLD_SIZE that a scheduler left behind: without the rest accelerate ignores it on a GPU and stops on a CPU."""
    needed = ("MASTER_ADDR", "LOCAL_RANK")
    missing = [name for name in needed if name not in env]
    if "WORLD_SIZE" in env and missing:
        seen = f"WORLD_SIZE={env['WORLD_SIZE']} but no {', '.join(missing)}"
        return Finding("warn", "rendezvous", f"{seen}; start with accelerate launch or torchrun, or unset WORLD_SIZE")
    return Finding("ok", "rendezvous", "no leftover of a launcher" if "WORLD_SIZE" not in env else "complete")
