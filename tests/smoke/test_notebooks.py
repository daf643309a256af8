"""The notebooks run from top to bottom, and the first one is the README's example."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "recipes" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))

PICTURES = {"1_drop_in": 1, "4_critical_tokens": 2}
# What the last cell of each that says something shows.
SHOWN = {
    "1_drop_in": "'gcpo/select/fraction': 0.296",
    "2_lora": "'JanusForConditionalGeneration'",
    "3_your_reward": "[0.0",
    "4_critical_tokens": "'critical': 0.296",
}


def code_of(path):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def shown_by(cell):
    """All that a cell left behind: what it printed and its value as text."""
    return "".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)


def test_the_notebooks_are_found():
    assert {path.stem for path in NOTEBOOKS} == set(SHOWN)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.fspath(ROOT))
    monkeypatch.setenv("MPLBACKEND", "agg")
    book = nbformat.read(path, as_version=4)
    NotebookClient(book, timeout=170, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = "".join(shown_by(cell) for cell in book.cells if cell.cell_type == "code")
    assert SHOWN[path.stem] in text.replace("\n", "")
    pictures = [out for cell in book.cells if cell.cell_type == "code" for out in cell.outputs if "data" in out]
    if path.stem in ("1_drop_in", "4_critical_tokens"):
        assert any("image/png" in out["data"] for out in pictures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_has_its_outputs(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in cells), f"{path.name} was not run to its end: make notebooks"
    text = "".join(shown_by(cell) for cell in cells)
    assert SHOWN[path.stem] in text.replace("\n", "")
    pictures = sum("image/png" in out.get("data", {}) for cell in cells for out in cell.outputs)
    assert pictures == PICTURES.get(path.stem, 0)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_small_and_says_nothing_of_the_machine(path):
    assert path.stat().st_size < 500_000
    outputs = [out for cell in json.loads(path.read_text())["cells"] for out in cell.get("outputs", [])]
    assert not any(out.get("name") == "stderr" for out in outputs)
    assert not re.search(
        r"(?<![\w.])/(tmp|root|home|work|Users)\b", json.dumps([_without_pictures(out) for out in outputs])
    )


def _without_pictures(output):
    return {**output, "data": {k: v for k, v in output.get("data", {}).items() if not k.startswith("image/")}}


def test_the_first_notebook_is_the_readmes_example():
    example = (ROOT / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert code_of(FOLDER / "1_drop_in.ipynb")[0].strip() == example.strip()
