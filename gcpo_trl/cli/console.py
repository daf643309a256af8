"""What a command says to its user. Logs go through logging; this is the answer itself."""

from __future__ import annotations

import sys


def say(text: str = "") -> None:
    """Write a line to standard output at once."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
