"""A line of the doctor's report."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "FAIL"]


@dataclass(frozen=True)
class Finding:
    """What a check saw. ``text``: what was seen, and after a semicolon what to do about it."""

    status: Status
    subject: str
    text: str

    def line(self) -> str:
        """The line of the report."""
        return f"{self.status:<6}{self.subject}: {self.text}"
