"""Text in a picture as a reward: what an OCR model reads against what the prompt puts in quotes.

    picture -> lines of text with confidences (PP-OCRv6 small, ONNX) -> one of the measures in _ocr_values.py

The models come inside the `rapidocr` package (Apache-2.0) and are named by their path, so nothing is ever downloaded.
Published rewards were computed with PaddleOCR; the readings differ in detail, the formulas do not.

A picture that could not be read at all has no reward (None). A picture in which there is no text was read: it has 0,
and -0.6 under "var_rl", whose formula says so.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reward_funcs._ocr_values import MEASURES
from reward_funcs.runtime import check_images, dataset_column, prompt_text

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

VALUES = tuple(MEASURES)
PACKAGES = ("onnxruntime", "rapidfuzz", "rapidocr")
DETECTION, RECOGNITION = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"  # in rapidocr 3.10.0
# "straight", “English”, „German“ or „Polish”, «French». A single quote is an apostrophe too often.
QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”|„([^“”]*)[“”]|«([^»]*)»')


@dataclass(frozen=True)
class Reader:
    """How the picture is read.

    side: pixels of the longer side at which text is looked for (a larger picture is shrunk for that); recognition then
    reads the found lines at full size. Larger finds smaller text and takes longer. threads: of one process.
    """

    side: int = field(default_factory=lambda: int(os.environ.get("OCR_SIDE", "320")))
    threads: int = 1


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Image | None],
    value: str = "flow_grpo",
    reader: Reader | None = None,
    **columns: Any,
) -> list[float | None]:
    """How well each picture shows the text quoted in its prompt; None where it could not be read or is None."""
    if value not in MEASURES:
        raise ValueError(f"value={value!r}; write one of {', '.join(VALUES)}")
    check_images("ocr", completions, prompts=prompts)
    asked = {i: targets(prompts[i]) for i, image in enumerate(completions) if image is not None}
    rewards: list[float | None] = [None] * len(completions)
    for index, texts in asked.items():
        image = completions[index]
        lines = None if image is None else read_or_none(image, reader or Reader())
        rewards[index] = None if lines is None else MEASURES[value](lines, texts)
    return rewards


def flow_grpo(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """`reward` with value="flow_grpo", for a recipe: reward_funcs.ocr:flow_grpo."""
    return reward(prompts, completions, "flow_grpo", **columns)


def var_rl(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """`reward` with value="var_rl", for a recipe: reward_funcs.ocr:var_rl."""
    return reward(prompts, completions, "var_rl", **columns)


def word_accuracy(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """`reward` with value="word_accuracy", for a recipe: reward_funcs.ocr:word_accuracy."""
    return reward(prompts, completions, "word_accuracy", **columns)


def ned(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """`reward` with value="ned", for a recipe: reward_funcs.ocr:ned."""
    return reward(prompts, completions, "ned", **columns)


def check_rows(dataset: Any) -> None:
    """Every prompt quotes a text and the OCR packages are there; the trainer asks before it loads a model."""
    check_installed()
    for prompt in dataset_column("ocr", dataset, "prompt"):
        targets(prompt)


def targets(prompt: Any) -> list[str]:
    """The quoted texts of a prompt, in order; a ValueError says which prompt has none or an empty one."""
    text = prompt_text(prompt)
    found = [next(part for part in match.groups() if part is not None) for match in QUOTED.finditer(text)]
    if text.count('"') % 2:
        raise ValueError(f'the prompt {text!r} has an odd number of ": close the quote, or write inches in words')
    if not found:
        raise ValueError(f"the prompt {text!r} quotes no text; put what the picture should say in double quotes")
    if not all(part.strip() for part in found):
        raise ValueError(f"the prompt {text!r} has empty quotes; write the text between them, or drop them")
    return found


def read_or_none(image: Image, reader: Reader) -> list[tuple[str, float]] | None:
    """Lines of text with their confidences, top to bottom; None, with a warning, for a picture OCR fails on."""
    engine = load_engine(reader)
    try:
        return read(engine, image)
    except Exception as error:  # whatever one picture does to OCR must not end the run
        logger.warning("ocr: a picture of %s could not be read, so it has no reward: %r", image.size, error)
        return None


def read(engine: Any, image: Image) -> list[tuple[str, float]]:
    """Lines of text with their confidences, top to bottom; empty where there is no text."""
    import numpy as np

    found = engine(np.asarray(image.convert("RGB"))[:, :, ::-1])  # the engine takes BGR, as OpenCV reads files
    return [] if found.txts is None else list(zip(found.txts, map(float, found.scores), strict=True))


@functools.cache
def load_engine(reader: Reader) -> Any:
    """The OCR engine on its bundled models, loaded once a process. No classifier of upside-down text: it costs time."""
    check_installed()
    import rapidocr

    folder = Path(rapidocr.__file__).parent / "models"
    for name in (DETECTION, RECOGNITION):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"this rapidocr does not carry {name} in {folder}: run `pip install rapidocr==3.10.0`, which does"
            )
    return rapidocr.RapidOCR(
        params={
            "Global.log_level": "error",  # it warns of every picture without text
            "Global.use_cls": False,
            "Det.model_path": str(folder / DETECTION),
            "Rec.model_path": str(folder / RECOGNITION),
            "Det.limit_type": "max",
            "Det.limit_side_len": reader.side,
            "EngineConfig.onnxruntime.intra_op_num_threads": reader.threads,
        }
    )


def check_installed() -> None:
    """The optional packages are there."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f"the reward 'ocr' needs {', '.join(missing)}: run `pip install 'gcpo_trl[ocr]'`")
