"""Group Critical-token Policy Optimization for autoregressive image generators, as a plug-in for TRL.

Names are imported on first use, so that ``import gcpo_trl`` loads no model code.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .config import GCPOConfig
    from .monitoring.held_out import HeldOutCallback
    from .trainer import GCPOTrainer

__all__ = ["GCPOConfig", "GCPOTrainer", "HeldOutCallback", "__version__"]

_HOME = {"GCPOConfig": "config", "GCPOTrainer": "trainer", "HeldOutCallback": "monitoring.held_out"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
