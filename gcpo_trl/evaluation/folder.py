"""Pictures of a run on disk, in GenEval's layout, with the settings they were drawn with.

    settings.json                  what decides the pictures; a folder with other settings is refused
    00000/metadata.jsonl           the prompt's row, one line
    00000/samples/0000.png ...     whole or absent: written under another name first, then renamed

A picture's file also holds the tokens it was decoded from and their mean entropy, as a text chunk of the PNG: written
and renamed with it, they are there if it is, and who reads the picture need not know.
The folder is what GenEval's evaluation/evaluate_images.py takes.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

SETTINGS = "settings.json"
SEEN = "gcpo_trl"  # name of the text chunk
PART = ".part"


class Folder:
    """Picture `index` is sample ``index % images_per_prompt`` of prompt ``index // images_per_prompt``."""

    def __init__(self, path: Path, images_per_prompt: int) -> None:
        self.path, self.images_per_prompt = path, images_per_prompt

    def open(self, settings: Mapping[str, Any], replace: bool = False) -> None:
        """Begin, or go on where these settings began; one process does. Raises ValueError on another run's folder.

        replace: remove what another run has drawn here.
        """
        file = self.path / SETTINGS
        if not file.is_file():
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ValueError(f"{self.path} exists and is no run's pictures (no {SETTINGS}); give another --out")
        elif replace:
            self.clear()
        elif changed := differences(json.loads(file.read_text()), settings):
            raise ValueError(
                f"{self.path} was drawn with other settings: {'; '.join(changed)}. Give another --out, or --force to "
                "replace the pictures"
            )
        for part in self.path.rglob(f".*{PART}"):  # of a killed run
            part.unlink()
        write_whole(file, (json.dumps(settings, indent=2) + "\n").encode())

    def clear(self) -> None:
        """Remove every prompt's folder; the settings stay until they are replaced."""
        for folder in self.path.iterdir():
            if folder.name.isdigit() and folder.is_dir():
                shutil.rmtree(folder)

    def picture_path(self, index: int) -> Path:
        """Where picture `index` lies."""
        prompt, sample = divmod(index, self.images_per_prompt)
        return self.path / f"{prompt:05d}" / "samples" / f"{sample:04d}.png"

    def has(self, index: int) -> bool:
        """Whether picture `index` is drawn."""
        return self.picture_path(index).is_file()

    def save(
        self,
        index: int,
        picture: Image.Image,
        row: Mapping[str, Any],
        tokens: Sequence[int] | None = None,
        entropy: float | None = None,
    ) -> None:
        """Write a picture with its tokens and their mean entropy, and before it the row of its prompt."""
        path = self.picture_path(index)
        about = path.parents[1] / "metadata.jsonl"
        if not about.is_file():
            write_whole(about, f"{described(row)}\n".encode())
        data, info = io.BytesIO(), PngInfo()
        if tokens is not None:
            info.add_text(SEEN, json.dumps({"entropy": entropy, "tokens": list(tokens)}), zip=True)
        picture.save(data, format="PNG", pnginfo=info)
        write_whole(path, data.getvalue())

    def read(self, index: int) -> Image.Image:
        """Picture `index`; raises OSError naming the file if it cannot be read."""
        path = self.picture_path(index)
        try:
            with Image.open(path) as picture:
                picture.load()
                return picture
        except (OSError, SyntaxError) as error:  # Pillow calls some broken PNGs a SyntaxError
            raise OSError(f"{path} cannot be read ({error}); delete it and run again to draw it anew") from error

    def read_drawn(self, index: int) -> tuple[Image.Image, list[int] | None, float | None]:
        """Picture `index`, its tokens and their mean entropy; None where the file does not hold them."""
        picture = self.read(index)
        seen = json.loads(picture.info.get(SEEN, "{}"))
        return picture, seen.get("tokens"), seen.get("entropy")


def described(row: Mapping[str, Any]) -> str:
    """A row as one line: GenEval's metadata, which hold the prompt, as they are; else the row as JSON."""
    metadata = row.get("metadata")
    return metadata if isinstance(metadata, str) and metadata.startswith('{"tag": ') else json.dumps(row)


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Each setting that differs, as ``name was, now is``."""
    old, new = dict(flat(before)), dict(flat(now))
    return [
        f"{name} {old.get(name)!r}, now {new.get(name)!r}"
        for name in dict.fromkeys([*old, *new])
        if old.get(name) != new.get(name)
    ]


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings under dotted names."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is whole or absent. Several processes may write the same bytes at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}{PART}")
    try:
        part.write_bytes(data)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
