"""What the policy draws while it trains: grids in ``output_dir/images`` and, as ``gcpo/images``, in the trackers.

    rows of whole groups -> shrunk on their own rank -> gathered -> one sheet, drawn and sent by the main process

A sheet shows each picture beside its critical tokens, under its prompt and its reward; a group starts a new line.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from PIL import Image, ImageDraw
from torch import Tensor

from .. import trl_compat
from ..objective.layout import Layout
from .overlays import GAP, LABEL_HEIGHT, enlarge, overlay, shrink, with_legend

NAME = "gcpo/images"
TRACKER_STEP = "train/global_step"  # the axis that transformers' callbacks give every metric in wandb and trackio
MIN_TILE = 144  # pixels; smaller pictures are drawn enlarged, because their labels would not fit
PICTURES_A_LINE = 4
PROMPT_CHARACTERS = 200  # what a prompt may weigh between ranks; drawing cuts it further, to its picture's width


@dataclass(frozen=True)
class Shown:
    """One picture as it travels between ranks: its shrunk pixels, two lines of text and its critical tokens.

    picture: (height, width, 3) uint8. masks: for each strategy (seq,) bool, True where it chose a token.
    """

    picture: np.ndarray
    prompt: str
    reward: str
    masks: dict[str, np.ndarray]


class ImageLog:
    """Draws a grid every ``args.log_images`` optimizer steps of a `GCPOTrainer` whose policy draws images."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.args = trainer.args
        self.folder = Path(trainer.args.output_dir) / "images"
        self._last: int | None = None

    def show(
        self,
        step: int,
        images: Sequence[Image.Image],
        prompts: Sequence[Any],
        rewards: Tensor,
        masks: dict[str, Tensor],
    ) -> None:
        """Save and send the grid of one generation, if one is due. Every rank must call this, as ranks gather.

        step     the optimizer step that these images train, from 1
        images   this rank's pictures; prompts: theirs, strings or conversations
        rewards  (images of all ranks, reward functions), NaN where a function gave none
        masks    what `critical_tokens` returned for this rank's images, (images, seq) each; empty where all train
        """
        last = step - 1 if self._last is None else self._last  # a run that is resumed starts to count where it stands
        self._last = step
        if not due(step, last, self.args.log_images):
            return
        accelerator = self.trainer.accelerator
        count = shown_count(
            len(images) * accelerator.num_processes, self.trainer.num_generations, self.args.log_images_count
        )
        first = accelerator.process_index * len(images)
        chosen = [row for row in range(len(images)) if first + row < count]
        names, weights = self.trainer.reward_func_names, self.trainer.reward_weights.tolist()
        tinted = self._tinted(masks)
        rows = [
            Shown(
                picture=np.asarray(shrink(images[row].convert("RGB"), self.args.log_images_size)),
                prompt=prompt_line(prompts[row]),
                reward=reward_line(names, rewards[first + row].tolist(), weights),
                masks={name: mask[row].cpu().numpy() for name, mask in tinted.items()},
            )
            for row in chosen
        ]
        rows = gather_object(rows)  # in the order of the ranks, which is that of the groups
        if accelerator.is_main_process:
            page = sheet(rows, self.trainer.num_generations, self.trainer.policy.layout)
            save(page, self.folder / f"step-{step:06d}.png")
            send(page, step, self.args.report_to, trl_compat.tensorboard_writer(self.trainer))

    def _tinted(self, masks: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is tinted: each strategy's tokens, or, under ``select_complement``, the tokens that train instead."""
        if masks and self.args.select_complement:
            return {"complement": masks["critical"]}
        return {name: mask for name, mask in masks.items() if name != "critical"}


def due(step: int, last: int, every: int) -> bool:
    """Whether a multiple of ``every`` lies after step ``last`` and not after ``step``.

    Images are not drawn at every optimizer step where ``num_iterations`` or ``steps_per_generation`` reuse them; then
    the first ones drawn after a multiple are shown. Of several drawn for one step, only the first are.
    """
    return step // every > last // every


def shown_count(rows: int, group: int, count: int) -> int:
    """How many of the first ``rows`` images are shown: whole groups, at most ``count`` images in all.

    Of a group larger than ``count`` only ``count`` images are shown, since the bound is what the user relies on.
    """
    whole = count // group * group
    return min(rows, whole or count)


def prompt_line(prompt: Any) -> str:
    """A prompt as one line of text, bounded in length; of a conversation, what was last said."""
    if not isinstance(prompt, str):
        content = prompt[-1]["content"]
        parts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
        prompt = " ".join(parts)
    line = " ".join(prompt.split())
    return line if len(line) <= PROMPT_CHARACTERS else line[: PROMPT_CHARACTERS - 3] + "..."


def reward_line(names: Sequence[str], values: Sequence[float], weights: Sequence[float]) -> str:
    """The reward that trains, the weighted sum of those given (NaN is none), and each, if there are several."""
    given = [weight * value for value, weight in zip(values, weights, strict=True) if not math.isnan(value)]
    line = f"reward {sum(given):.3f}" if given else "reward none"
    if len(names) == 1:
        return line
    each = (
        f"{name} {'none' if math.isnan(value) else f'{value:.3f}'}" for name, value in zip(names, values, strict=True)
    )
    return f"{line}: {', '.join(each)}"


def placed(groups: Sequence[int], cell: tuple[int, int], columns: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Width and height of a sheet and the upper left corner of every cell, in pixels; each group starts a new line.

    groups: images of each group. cell: width and height. columns: cells a line at most.
    """
    width, height = cell
    corners, line = [], 0
    for size in groups:
        for index in range(size):
            row, column = divmod(index, columns)
            corners.append((GAP + column * (width + GAP), GAP + (line + row) * (height + GAP)))
        line += math.ceil(size / columns)
    used = min(columns, max(groups))
    return (GAP + used * (width + GAP), GAP + line * (height + GAP)), corners


def sheet(rows: Sequence[Shown], group: int, layout: Layout) -> Image.Image:
    """The rows as one picture: ``group`` rows belong together; ``layout`` says where tokens lie."""
    pictures = [Image.fromarray(row.picture) for row in rows]
    tile = max(MIN_TILE, *pictures[0].size)
    tiles = [
        [enlarge(picture, tile), *([overlay(picture, as_batch(row.masks), layout, 0, tile)] if row.masks else [])]
        for row, picture in zip(rows, pictures, strict=True)
    ]
    beside, (width, height) = len(tiles[0]), tiles[0][0].size
    cell = (beside * (width + GAP) - GAP, 2 * LABEL_HEIGHT + height)
    sizes = [len(rows[i : i + group]) for i in range(0, len(rows), group)]
    size, corners = placed(sizes, cell, columns=PICTURES_A_LINE // beside)
    page = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(page)
    for row, cells, (left, top) in zip(rows, tiles, corners, strict=True):
        draw.text((left, top), fitted(draw, row.prompt, cell[0]), fill="black")
        draw.text((left, top + LABEL_HEIGHT), fitted(draw, row.reward, cell[0]), fill="black")
        for index, picture in enumerate(cells):
            page.paste(picture, (left + index * (width + GAP), top + 2 * LABEL_HEIGHT))
    return with_legend(page, list(rows[0].masks))


def as_batch(masks: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Masks of one image, (seq,) each, as a batch of one, (1, seq)."""
    return {name: torch.from_numpy(mask)[None] for name, mask in masks.items()}


def fitted(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """As much of the text as fits into ``width`` pixels, ending in dots where it was cut."""
    text = text.encode("latin-1", "replace").decode("latin-1")  # Pillow's own font may know no other letters
    if draw.textlength(text) <= width:
        return text
    while text and draw.textlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


def save(page: Image.Image, path: Path) -> None:
    """Write a PNG that is whole or absent: under another name first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        page.save(part, format="PNG")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def send(page: Image.Image, step: int, report_to: Sequence[str], writer: Any | None) -> None:
    """Hand the page to the trackers named in ``report_to`` and to tensorboard's ``writer``, if there is one."""
    for tracker in ("wandb", "trackio"):
        if tracker in report_to:
            module = importlib.import_module(tracker)
            if tracker == "wandb" and module.run is None:  # switched off by its own environment variable
                continue
            module.log({NAME: module.Image(page), TRACKER_STEP: step})
    if writer is not None:
        writer.add_image(NAME, np.asarray(page), step, dataformats="HWC")
