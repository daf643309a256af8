"""The processes that share an evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Ranks:
    """This process among those that share a run, all of which must call the same functions."""

    rank: int = 0
    world: int = 1

    def share(self, parts: list[Any]) -> list[Any]:
        """Every world-th part, from this rank on."""
        return parts[self.rank :: self.world]
