"""Every file of reward_funcs, also one added tomorrow: a plain `reward`, independent of gcpo_trl, cheap to import."""

import ast
import asyncio
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "reward_funcs"
FILES = sorted(FOLDER.glob("*.py"))
PUBLIC = [path.stem for path in FILES if not path.stem.startswith("_") and path.stem != "runtime"]
LIGHT = {*sys.stdlib_module_names, "numpy", "reward_funcs"}


def imported_roots(nodes):
    """First name of every absolute import among the nodes."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def executed_on_import(node):
    """The nodes Python runs when it imports the module: not function bodies, not `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            continue
        yield child
        yield from executed_on_import(child)


def test_the_rewards_are_found():
    assert {"geneval", "hpsv2", "ocr", "reconstruction", "remote", "shapes"} <= set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_reward_takes_prompts_completions_and_columns(name):
    reward = importlib.import_module(f"reward_funcs.{name}").reward
    parameters = inspect.signature(reward).parameters.values()
    assert [parameter.name for parameter in parameters][:2] == ["prompts", "completions"]
    # TRL passes every dataset column and more by keyword.
    assert any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)


@pytest.mark.parametrize("name", PUBLIC)
def test_an_image_that_failed_has_no_reward(name):
    # None becomes advantage zero; a 0 would teach that the prompt is hopeless. No model is needed to say so.
    metadata = ['{"tag": "single_object", "include": [{"class": "cat", "count": 1}]}']
    columns = {"metadata": metadata, "target": [None], "completion_ids": [[1]]}
    reward = importlib.import_module(f"reward_funcs.{name}").reward
    answer = reward(prompts=["a photo of a cat"], completions=[None], **columns)
    assert (asyncio.run(answer) if inspect.iscoroutine(answer) else answer) == [None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_reward_is_independent_of_gcpo_trl(path):
    assert "gcpo_trl" not in imported_roots(ast.walk(ast.parse(path.read_text())))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_heavy_imports_are_inside_functions(path):
    assert set(imported_roots(executed_on_import(ast.parse(path.read_text())))) <= LIGHT


def test_importing_all_rewards_loads_no_heavy_library():
    imports = "; ".join(f"import reward_funcs.{name}" for name in PUBLIC)
    heavy = "{'torch', 'transformers', 'scipy', 'gcpo_trl'} & set(sys.modules)"
    subprocess.run(
        [sys.executable, "-c", f"import sys; {imports}; sys.exit({heavy} or 0)"], check=True, cwd=FOLDER.parent
    )


def test_the_import_check_sees_what_runs_on_import():
    source = "import torch\nclass A:\n    import scipy\nif x:\n    import jax\ndef f():\n    import transformers\n"
    guarded = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
    assert set(imported_roots(executed_on_import(ast.parse(source)))) == {"torch", "scipy", "jax"}
    assert set(imported_roots(executed_on_import(ast.parse(guarded)))) == {"typing"}
