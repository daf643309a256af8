"""Files of prompts as rows: a dictionary each, with a ``prompt`` and whatever else the file says about it.

    .txt           one prompt a line; blank lines separate
    .jsonl         one string or object with a "prompt" a line; lines of GenEval's evaluation_metadata.jsonl too
    .json          the same in one list, or line by line (HPSv2's benchmark files are lists of strings)
    .csv, .tsv     a header with a column "prompt" or "prompts", in any case (DrawBench, PartiPrompts)
    a folder       HPSv2's benchmark: anime.json, concept-art.json, paintings.json, photo.json; column "style"
    "geneval"      the 553 prompts of the benchmark, with metadata

Nested values become JSON strings, since an Arrow table cannot hold fields that differ from row to row; only a prompt
that is a conversation stays as it is. A column that a row lacks is None there. Text is UTF-8.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import geneval

Row = dict[str, Any]
STYLES = ("anime", "concept-art", "paintings", "photo")  # HPSv2, hpsv2/evaluation.py
PROMPT_COLUMNS = ("prompt", "prompts")  # PartiPrompts has "Prompt", DrawBench "Prompts"


def load(path_or_name: str | Path) -> list[Row]:
    """Rows of a file, of HPSv2's benchmark folder or of ``"geneval"``, all with the same columns.

    Raises ValueError naming the file, the line and what is wrong with it.
    """
    if path_or_name == "geneval":
        return [geneval.row(metadata) for metadata in geneval.official()]
    path = Path(path_or_name)
    if path.is_dir():
        return even([{**row, "style": style} for style in STYLES for row in load_style(path, style)])
    if path.suffix.lower() not in READERS:
        raise ValueError(f"{path} has no known ending; give a {', '.join(READERS)} file, a folder or 'geneval'")
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is not a file; give an existing one")
    rows = READERS[path.suffix.lower()](path)
    if not rows:
        raise ValueError(f"{path} has no prompts; write at least one")
    return even(rows)


def readable(path: Path) -> bool:
    """Whether `load` is meant for this path: by its ending, or as a folder with a file of HPSv2's benchmark."""
    if path.is_dir():
        return any((path / f"{style}.json").is_file() for style in STYLES)
    return path.suffix.lower() in READERS


def load_style(folder: Path, style: str) -> list[Row]:
    """Rows of one style of HPSv2's benchmark."""
    path = folder / f"{style}.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no {path.name}; HPSv2's benchmark has {', '.join(STYLES)}, each a .json file")
    return load(path)


def even(rows: list[Row]) -> list[Row]:
    """The rows with every column of any of them; None where a row had none."""
    columns = dict.fromkeys(column for row in rows for column in row)
    return [{column: row.get(column) for column in columns} for row in rows]


def read_text(path: Path) -> str:
    """The text of a file, with or without a byte order mark."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8; save the file as UTF-8"
        ) from error


def numbered_lines(text: str) -> list[tuple[int, str]]:
    """Lines that are not blank, stripped, with their numbers from 1.

    Not `splitlines`, which also cuts at U+2028 and other characters that JSON strings and prompts may hold.
    """
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line.strip()) for number, line in lines if line.strip()]


def read_plain(path: Path) -> list[Row]:
    """One prompt a line."""
    return [{"prompt": line} for _, line in numbered_lines(read_text(path))]


def read_json_lines(path: Path) -> list[Row]:
    """One JSON value a line."""
    rows = []
    for number, line in numbered_lines(read_text(path)):
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: {error.msg} at column {error.colno}; write one JSON value a line") from error
        rows.append(row_of(entry, where))
    return rows


def read_json(path: Path) -> list[Row]:
    """A JSON list, or JSON lines under another name."""
    text = read_text(path)
    if not text.lstrip().startswith("["):
        return read_json_lines(path)
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: {error.msg} at column {error.colno}") from error
    return [row_of(entry, f"{path}, entry {number}") for number, entry in enumerate(entries, start=1)]


def read_csv(path: Path) -> list[Row]:
    """Comma-separated cells under a header, quoted where needed."""
    return read_table(path, delimiter=",", strict=True)


def read_tsv(path: Path) -> list[Row]:
    """Tab-separated cells under a header. Quotes are part of the text, as in PartiPrompts: '"G I G G L E" painted'."""
    return read_table(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def read_table(path: Path, **dialect: Any) -> list[Row]:
    """Rows under a header; the prompt column is called ``prompt``, the others keep their names."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), **dialect)
    rows: list[Row] = []
    header: list[str] | None = None
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if header is None:
                header = header_of(cells, where)
            elif len(cells) != len(header):
                raise ValueError(f"{where}: {len(cells)} cells under a header of {len(header)}; quote or fill them")
            else:
                rows.append(row_of(dict(zip(header, cells, strict=True)), where))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return rows


def header_of(cells: list[str], where: str) -> list[str]:
    """Column names, the prompt's as ``prompt``."""
    named = [cell for cell in cells if cell.strip().lower() in PROMPT_COLUMNS]
    if len(named) != 1:
        raise ValueError(f"{where}: the header {cells} has {len(named)} prompt columns; name exactly one 'prompt'")
    if len(set(cells)) != len(cells):
        raise ValueError(f"{where}: the header {cells} has a name twice; rename one")
    return ["prompt" if cell == named[0] else cell for cell in cells]


def row_of(entry: Any, where: str) -> Row:
    """A checked row from a string or an object."""
    if isinstance(entry, str):
        entry = {"prompt": entry}
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: the entry is {entry!r}; write a string or an object with a 'prompt'")
    if "prompt" not in entry:
        raise ValueError(f"{where}: no 'prompt' among {sorted(entry)}; name the caption 'prompt'")
    prompt = entry["prompt"]
    if not is_conversation(prompt) and not (isinstance(prompt, str) and prompt.strip()):
        raise ValueError(f"{where}: the prompt is {prompt!r}; write a string that is not empty")
    if {"tag", "include"} <= set(entry) and "metadata" not in entry:
        return geneval.row(entry)  # a line of GenEval's own file is its metadata
    return {
        column: json.dumps(value) if column != "prompt" and isinstance(value, dict | list) else value
        for column, value in entry.items()
    }


def is_conversation(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, as text policies take them."""
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(m, dict) and "role" in m for m in prompt)


READERS: dict[str, Callable[[Path], list[Row]]] = {
    ".txt": read_plain,
    ".json": read_json,
    ".jsonl": read_json_lines,
    ".csv": read_csv,
    ".tsv": read_tsv,
}
