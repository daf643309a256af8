"""The picture of gcpo_trl/README.md shows the order of folders that test_layers.py enforces."""

import importlib.util
from pathlib import Path

from contract.test_layers import LEVELS

FOLDER = Path(__file__).parents[2] / "recipes" / "pictures"


def script():
    spec = importlib.util.spec_from_file_location("architecture", FOLDER / "architecture.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_what_its_script_makes_of_the_order():
    made = script()
    assert made.levels() == LEVELS[::-1]
    assert (FOLDER / "architecture.svg").read_text() == made.picture(), "run: python recipes/pictures/architecture.py"
