"""``python -m gcpo_trl`` is ``gcpo``; with a recipe as first argument it trains, as ``accelerate launch -m`` needs."""

import sys

from gcpo_trl.cli.main import main

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if arguments and arguments[0].endswith((".yaml", ".yml")):
        arguments = ["train", *arguments]
    raise SystemExit(main(arguments))
