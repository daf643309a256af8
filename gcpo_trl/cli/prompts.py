"""``gcpo prompts geneval``: the benchmark's 553 prompts, or training prompts that are none of them, as a file."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from ..evaluation.folder import write_whole
from ..prompts import geneval
from .console import say

DRAWN_ONLY = ("n", "seed", "weights", "unique")  # options that --official leaves nothing to decide


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("set", choices=["geneval"], help="which prompts")
    parser.add_argument("--official", action="store_true", help="the benchmark's own evaluation_metadata.jsonl")
    parser.add_argument("--n", type=int, default=None, help=f"rows ({geneval.ROWS})")
    parser.add_argument("--seed", type=int, default=None, help="of the draws (0)")
    published = " ".join(f"{tag}={weight}" for tag, weight in geneval.WEIGHTS.items())
    parser.add_argument(
        "--weights", nargs="+", default=None, metavar="TAG=WEIGHT", help=f"shares of the tasks ({published})"
    )
    parser.add_argument("--unique", action="store_true", default=None, help="no prompt twice, in whatever words")
    parser.add_argument("--out", type=Path, required=True, help="file to write, JSON lines")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def prepare(options: argparse.Namespace) -> Callable[[], int]:
    """Check the options and draw the prompts; the returned function writes the file and prints the counts."""
    if options.out.exists() and not options.force:
        raise ValueError(f"{options.out} exists; give another --out, or --force to replace it")
    given = {name: value for name in DRAWN_ONLY if (value := getattr(options, name)) is not None}
    if options.official:
        if given:
            raise ValueError(f"--official are 553 fixed prompts; leave out {', '.join('--' + name for name in given)}")
        metadata = geneval.official()
        table = official_table(Counter(asked["tag"] for asked in metadata))
        return lambda: report(options.out, geneval.official_text(), len(metadata), table)
    if "weights" in given:
        given["weights"] = weights_of(given["weights"])
    drawn = geneval.generate(**given)
    text = "".join(f"{json.dumps(row)}\n" for row in drawn.rows)
    return lambda: report(options.out, text, len(drawn.rows), counts_table(drawn.counts))


def weights_of(words: Iterable[str]) -> dict[str, float]:
    """``TAG=WEIGHT`` words as numbers by tag."""
    weights = {}
    for word in words:
        tag, _, number = word.partition("=")
        try:
            weights[tag] = float(number)
        except ValueError as error:
            raise ValueError(f"--weights {word!r}; write TAG=WEIGHT, such as counting=5") from error
    return weights


def report(path: Path, text: str, rows: int, table: str) -> int:
    """Write the file, then print the table."""
    write_whole(path, text.encode())
    say(table)
    say(f"\n{rows} prompts written to {path}")
    return 0


def official_table(tags: Mapping[str, int]) -> str:
    """Prompts a tag."""
    return "\n".join(f"{tag:14}{count:8}" for tag, count in [*tags.items(), ("all", sum(tags.values()))])


def counts_table(counts: Mapping[str, Any]) -> str:
    """What became of the draws of each tag, and of all."""
    columns = [field.name for field in dataclasses.fields(geneval.Counts)]
    rows = {tag: dataclasses.astuple(count) for tag, count in counts.items()}
    rows["all"] = tuple(map(sum, zip(*rows.values(), strict=True)))
    head = f"{'':14}" + "".join(f"{name.replace('_', ' '):>13}" for name in columns)
    return "\n".join([head, *(f"{tag:14}" + "".join(f"{n:13}" for n in numbers) for tag, numbers in rows.items())])
