"""Imports go down only, by folder. Read from the source, so that imports inside functions count too."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import gcpo_trl

ROOT = Path(__file__).parents[2]
ORDER = (
    "cli > bench > studies, memory > analysis, evaluation, runs > trainer > monitoring > rewards > config"
    " > rollout, shapes > policies > models, prompts > objective > plugins, extras, validation, version, trl_compat"
)
LEVELS = [level.split(", ") for level in reversed(ORDER.split(" > "))]
HEIGHT = {folder: height for height, level in enumerate(LEVELS) for folder in level}
MAY_IMPORT = {
    "trl": {"trainer", "config", "trl_compat", "runs", "memory"},
    "transformers": {
        *("models", "policies", "shapes"),
        *("trainer", "config", "trl_compat", "monitoring", "evaluation", "runs", "memory", "cli"),
    },
}
OBJECTIVE_LIBRARIES = {"torch", "einops", "jaxtyping"} | sys.stdlib_module_names


def imports(source: str, package: str) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of each import in a module of `package`, under TYPE_CHECKING or not."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                above = package.split(".")[: len(package.split(".")) + 1 - level] if level else []
                base = ".".join([*above, *([module] if module else [])])
                yield from ((node.lineno, f"{base}.{alias.name}") for alias in names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(name))]):
                yield node.lineno, name


def folder_of(path: str) -> str | None:
    """The folder of a file or of a dotted name under gcpo_trl; None for the root's __init__ and its dunder names."""
    name = path.removesuffix(".py").replace("/", ".").removeprefix("gcpo_trl.").partition(".")[0]
    if name == "__main__":
        return "cli"
    return None if name.startswith("__") else gcpo_trl._HOME.get(name, name).partition(".")[0]


def wrong_imports(path: str, source: str) -> list[str]:
    """Each import of the file `path` (relative to the repository) that breaks the order, as one line of text."""
    package = path.rpartition("/")[0].replace("/", ".")
    found = ((line, name, _reason(path, name)) for line, name in imports(source, package))
    return [f"{path}:{line} imports {name}: {reason}" for line, name, reason in found if reason]


def _reason(path: str, name: str) -> str | None:
    """Why this file may not import this name; None if it may."""
    library = name.partition(".")[0]
    if path.startswith("reward_funcs/"):
        return "reward_funcs stands alone" if library == "gcpo_trl" else None
    folder = folder_of(path)
    if folder is None:
        return None  # the root's __init__ names what it exports, and test_import_is_light holds it to that
    if library == "gcpo_trl":
        return _reason_inside(folder, folder_of(name))
    if library in MAY_IMPORT and folder not in MAY_IMPORT[library]:
        return f"only {', '.join(sorted(MAY_IMPORT[library]))} may import {library}"
    if folder == "objective" and library not in OBJECTIVE_LIBRARIES:
        return "objective imports torch, einops, jaxtyping and the standard library"
    return None


def _reason_inside(folder: str, target: str | None) -> str | None:
    if target is None or target == folder:
        return None
    if unplaced := {folder, target} - set(HEIGHT):
        return f"{', '.join(unplaced)} is in no level of the order"
    if folder == "objective":
        return "objective imports nothing of ours"
    return None if HEIGHT[target] < HEIGHT[folder] else f"{target} is not below {folder}"


def files() -> list[Path]:
    return sorted(path for package in ("gcpo_trl", "reward_funcs") for path in (ROOT / package).rglob("*.py"))


def test_every_folder_has_a_place_in_the_order():
    folders = {
        folder_of(path.relative_to(ROOT).as_posix()) for path in files() if path.is_relative_to(ROOT / "gcpo_trl")
    }
    unplaced = {folder for folder in folders if folder is not None} - set(HEIGHT)
    assert not unplaced, f"{sorted(unplaced)} have no level: name them in ORDER, run recipes/pictures/architecture.py"


def test_imports_go_down_only():
    wrong = [line for path in files() for line in wrong_imports(path.relative_to(ROOT).as_posix(), path.read_text())]
    assert not wrong, "\n".join(["imports that break the order:", *wrong])


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gcpo_trl/objective/loss.py", "from gcpo_trl.rollout import Rollout"),  # up
        ("gcpo_trl/objective/loss.py", "from ..rollout import Rollout"),  # up, relative
        ("gcpo_trl/objective/selection/random.py", "from ...rollout.engine import Rollout"),  # up, two folders deep
        (
            "gcpo_trl/objective/loss.py",
            "def f():\n    import gcpo_trl.trainer.gcpo_trainer",
        ),  # up, hidden in a function
        ("gcpo_trl/objective/loss.py", "from gcpo_trl import plugins"),  # sideways; and nothing of ours at all
        ("gcpo_trl/objective/loss.py", "import numpy"),  # a library too many
        ("gcpo_trl/shapes/build.py", "from ..rollout import sample"),  # sideways
        ("gcpo_trl/evaluation/geneval.py", "from gcpo_trl.analysis import maps"),  # sideways
        ("gcpo_trl/rollout/engine.py", "from gcpo_trl import GCPOConfig"),  # up, by a public name
        ("gcpo_trl/rollout/engine.py", "import importlib\nimportlib.import_module('gcpo_trl.cli')"),  # up, by name
        ("gcpo_trl/rollout/engine.py", "from transformers import StaticCache"),
        ("gcpo_trl/policies/janus.py", "import trl.trainer"),
        ("gcpo_trl/analysis/maps.py", "from gcpo_trl import cellar"),  # no such folder
        ("reward_funcs/geneval.py", "from gcpo_trl.plugins import resolve"),
    ],
)
def test_the_check_sees_a_wrong_import(path, source):
    assert len(wrong_imports(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("gcpo_trl/__init__.py", "from .trainer import GCPOTrainer"),
        ("gcpo_trl/objective/loss.py", "import math\nimport torch.nn.functional as F\nfrom einops import rearrange"),
        ("gcpo_trl/objective/selection/random.py", "from ..signals import Signals\nfrom ._ranking import lowest"),
        ("gcpo_trl/trainer.py", "from . import trl_compat\nfrom .rollout import sample\nfrom trl import GRPOTrainer"),
        ("gcpo_trl/cli/train.py", "from gcpo_trl import GCPOConfig, GCPOTrainer, __version__"),
        ("reward_funcs/hpsv2.py", "from . import _open_clip\nfrom transformers import CLIPModel"),
    ],
)
def test_the_check_lets_a_right_import_pass(path, source):
    assert wrong_imports(path, source) == []
