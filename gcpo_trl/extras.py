"""Optional packages: a missing one is an error that says which extra to install."""

from __future__ import annotations

import importlib.util


def require(package: str, extra: str) -> None:
    """Raise ImportError naming the extra if ``package`` is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ImportError(f"{package} is not installed; install it with: pip install 'gcpo_trl[{extra}]'")
