"""What a run must know of its launcher before its settings are read: devices, processes, accumulation."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch

BATCH_KEY = "per_device_train_batch_size"
TRUE = ("1", "true", "yes", "on")


def sharded_by() -> str | None:
    """The engine that `accelerate launch` asks for, ``DeepSpeed`` or ``FSDP``; None for plain processes."""
    for engine, variable in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("FSDP", "ACCELERATE_USE_FSDP")):
        if os.environ.get(variable, "").lower() in TRUE:
            return engine
    return None


def launcher_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without which accelerate would quietly run something else than it was asked for.

    ``use_cpu`` makes it train with DDP instead of DeepSpeed; without a GPU, DeepSpeed needs gloo and its CPU backend.
    Raises ValueError for FSDP without a GPU, which accelerate switches off.
    """
    engine = sharded_by()
    if engine is None or torch.accelerator.is_available():
        return {}
    if engine == "FSDP":
        raise ValueError("FSDP was asked for, but there is no GPU and accelerate has it on GPUs only; use ddp or zero2")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    return {"use_cpu": False, "ddp_backend": settings.get("ddp_backend", "gloo")}


def accumulation_for(total: int, per_device: int, processes: int, group: int) -> int:
    """Micro-batches an update takes, so that all processes together train on ``total`` images.

    Raises ValueError naming the nearest totals that can be met, where a whole number of groups fills the batch.
    """
    step = per_device * processes
    if total > 0 and total % step == 0 and total % group == 0:
        return total // step
    whole = math.lcm(step, group)
    below = total // whole * whole
    near = [n for n in (below, below + whole) if n > 0]
    raise ValueError(
        f"total_batch_size={total} cannot be met by {processes} processes of {per_device} images ({BATCH_KEY}) in "
        f"groups of {group}; nearest: {' or '.join(map(str, near))}"
    )


def processes() -> int:
    """Processes of this run, as the launcher set them."""
    return int(os.environ.get("WORLD_SIZE", "1"))
