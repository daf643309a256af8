"""Runs the notebooks of this folder and stores them with their outputs: `make notebooks`.

Each runs in an empty folder. What goes to stderr (progress bars, warnings with the paths of one machine) is left out.
"""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
LIBRARY_LOG = re.compile(r"^\[(INFO|WARNING|\d{4}-\d\d-\d\d).*\n", re.MULTILINE)
LOCAL = re.compile(r"(?<![\w.])/(tmp|root|home|work|Users|usr|opt)/")


def kept(output: Any) -> bool:
    """Whether an output belongs into the stored notebook, written to: no stderr, no log lines, no second format."""
    if output.output_type == "stream":
        output.text = LIBRARY_LOG.sub("", output.text)
        return bool(output.name == "stdout" and output.text.strip())
    if "image/png" in output.get("data", {}):
        output.data.pop("image/jpeg", None)
    return "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def execute(path: Path) -> None:
    """Run one notebook and write it back. ValueError for an output that shows a folder of this machine."""
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(book, timeout=600, resources={"metadata": {"path": folder}}, record_timing=False).execute()
    book.metadata.pop("widgets", None)
    book.metadata.language_info = {"name": "python"}
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        cell.outputs = [output for output in cell.outputs if kept(output)]
        texts = [str(value) for output in cell.outputs for value in (output.get("text", ""), *_texts(output))]
        if found := [text for text in texts if LOCAL.search(text)]:
            raise ValueError(f"{path.name}: {found[0][:200]!r} names a folder of this machine; print less in that cell")
    nbformat.write(book, path)


def _texts(output: Any) -> list[Any]:
    return [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]


if __name__ == "__main__":
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"  # figures become outputs
    os.environ.setdefault("PYTHONPATH", os.fspath(HERE.parents[1]))
    for notebook in sorted(HERE.glob("*.ipynb")):
        execute(notebook)
