"""Checks of single values, for whoever takes settings: what was seen, and what to write instead."""

from __future__ import annotations

from typing import Any

import torch


def check_count(name: str, value: Any, least: int, hint: str) -> None:
    """Raise TypeError or ValueError unless ``value`` is a whole number >= ``least``; ``hint`` says what to write."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is no whole number; {hint}")
    if value < least:
        raise ValueError(f"{name}={value} must be >= {least}; {hint}")


def check_device(name: str, value: str) -> None:
    """Raise ValueError unless ``value`` is "auto" or a device that this machine has."""
    if value == "auto":
        return
    try:
        device = torch.device(str(value))
    except RuntimeError as error:
        raise ValueError(f"{name}={value!r} is no device; write 'auto', 'cpu' or a GPU such as 'cuda:1'") from error
    present = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if present is not None and present.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ValueError(
            f"{name}={value!r}, but torch {torch.__version__} sees {count} {device.type} device(s); write 'auto', "
            "'cpu' or one of those, or look at CUDA_VISIBLE_DEVICES"
        )


def first_non_finite(model: torch.nn.Module) -> str:
    """Name of the first parameter that holds NaN or infinity, or a sentence that says there is none."""
    for name, parameter in model.named_parameters():
        # Where parameters are sharded this looks at the process's own part: no process may wait for another here.
        part = getattr(parameter, "ds_tensor", parameter)
        part = part.to_local() if hasattr(part, "to_local") else part
        if not torch.isfinite(part).all():
            return f"parameter {name} is not finite"
    return "all parameters are finite, so an activation or a reward overflowed"
