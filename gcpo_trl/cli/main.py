"""``gcpo`` and ``python -m gcpo_trl``: parse, call, exit code. Heavy imports wait for the command that needs them."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator

from .console import say

COMMANDS = {
    "train": "train as a recipe says: gcpo train RECIPE.yaml [--key value ...]",
    "sample": "draw images for prompts: gcpo sample --prompt 'a photo of a red circle' --out samples.png",
    "prompts": "write GenEval's prompts, or training prompts that avoid them: gcpo prompts geneval --out FILE.jsonl",
    "evaluate": "score a model on a benchmark, or compare runs: gcpo evaluate --benchmark geneval --out report.json",
    "convert": "released checkpoints into folders that from_pretrained opens: gcpo convert llamagen IN.pt OUT/",
    "demo": "train on the shapes world and show what was learnt",
    "study": "the runs of a comparison, their table and pictures: gcpo study recipes/studies/table3.yaml",
    "bench": "measure speed and memory beside a peer: gcpo bench rollout|loss|selection|step|scale [--json FILE]",
    "doctor": "check this installation, or count a recipe's memory: gcpo doctor [--memory RECIPE.yaml]",
    "serve-rewards": "serve rewards over HTTP to training elsewhere: gcpo serve-rewards geneval hpsv2 --port 8000",
    "shapes-model": "train a tiny model of the shapes world from scratch",
}
TAKES_KEYS = ("train", "doctor")  # commands that take a recipe's --key value, and so read their words themselves


def main(argv: list[str] | None = None) -> int:
    """Run a command; 0 on success, 2 for a mistake of the user, whose message is printed without a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    for noisy in ("httpx", "httpx2", "filelock", "PIL", "matplotlib"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not argv or argv[0] in ("-h", "--help") or argv[0] not in COMMANDS:
        return _usage(argv)
    command, arguments = argv[0], argv[1:]
    with mistakes_reported(command):
        module = importlib.import_module(f".{command.replace('-', '_')}", __package__)
        if command in TAKES_KEYS:
            run = module.prepare(arguments)
        else:
            parser = argparse.ArgumentParser(prog=f"gcpo {command}", description=COMMANDS[command])
            module.add_arguments(parser)
            run = module.prepare(parser.parse_args(arguments))
    # From here on an exception is not the user's mistake, and keeps its traceback.
    return run()


@contextlib.contextmanager
def mistakes_reported(command: str) -> Iterator[None]:
    """What goes wrong before the work starts is the user's to mend: the message and exit code 2, no traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        sys.stderr.write(f"gcpo {command}: {error}\n")
        raise SystemExit(2) from error


def _usage(argv: list[str]) -> int:
    known = not argv or argv[0] in ("-h", "--help")
    if not known:
        sys.stderr.write(f"gcpo: there is no command {argv[0]!r}\n")
    say("usage: gcpo COMMAND [options]\n")
    for name, text in COMMANDS.items():
        say(f"  {name:14}{text}")
    return 0 if known else 2


if __name__ == "__main__":
    raise SystemExit(main())
