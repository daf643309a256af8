"""What goes over the wire between `remote` and `gcpo serve-rewards`: JSON, with pictures as PNG in base64.

    POST /score   {"protocol": 1, "reward": name, "images": [{"id", "sha256", "png", "prompt", "columns"}, ...]}
    answer        {"protocol": 1, "results": [{"id", "value": number | null, "error": text | null}, ...]}
    GET /health
    answer        {"protocol": 1, "version", "limits", "rewards": {name: {"golden": number | null, "error": ...}}}

A value of null without an error is the reward's own None; with an error the picture was lost. JSON and not multipart:
a third more bytes, but one parser, one schema and one limit on both sides.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

PROTOCOL = 1
SCORE, HEALTH = "/score", "/health"
CONTENT_TYPE = "application/json"
PNG_MODES = ("1", "L", "LA", "I;16", "P", "RGB", "RGBA")  # others are sent as RGB


class AnswerError(Exception):
    """The server answered, and the answer as a whole cannot be believed."""


@dataclass(frozen=True)
class Picture:
    """A picture to score, with the prompt as text and this row of the dataset's columns."""

    id: str
    image: Image
    prompt: str
    columns: Mapping[str, Any]

    @functools.cached_property
    def png(self) -> bytes:
        """The picture without loss; encoded once, also if it is sent again in a smaller batch."""
        image = self.image if self.image.mode in PNG_MODES else self.image.convert("RGB")
        buffer = BytesIO()
        image.save(buffer, format="PNG", compress_level=1)  # the time goes into the network or the reward, not here
        return buffer.getvalue()


@dataclass(frozen=True)
class Result:
    """What became of a picture: a value, the reward's own None, or the reason why it was lost."""

    value: float | None = None
    error: str | None = None


def body(pictures: Sequence[Picture], name: str) -> bytes:
    """The request. Raises ValueError if a column holds what JSON cannot."""
    images = [
        {
            "id": picture.id,
            "sha256": hashlib.sha256(picture.png).hexdigest(),
            "png": base64.b64encode(picture.png).decode(),
            "prompt": picture.prompt,
            "columns": picture.columns,
        }
        for picture in pictures
    ]
    return json.dumps({"protocol": PROTOCOL, "reward": name, "images": images}, allow_nan=False).encode()


def read(content: bytes, pictures: Sequence[Picture], name: str) -> dict[str, Result]:
    """Result of each picture by id. Raises AnswerError unless there is exactly one for each picture sent."""
    results = _object(content).get("results")
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        raise AnswerError(f"the answer has no list of results: {content[:80]!r}")
    if len(results) != len(pictures):
        raise AnswerError(f"{len(results)} results for {len(pictures)} pictures")
    by_id = {str(one.get("id")): one for one in results}
    if by_id.keys() != {picture.id for picture in pictures}:
        raise AnswerError(f"the results are of other pictures: {sorted(by_id)[:3]}, not {pictures[0].id} ...")
    return {id: as_result(one.get("value"), one.get("error")) for id, one in by_id.items()}


def read_health(content: bytes) -> dict[str, Any]:
    """The health answer. Raises AnswerError if it is not one of this protocol."""
    health = _object(content)
    if not isinstance(health.get("rewards"), dict):
        raise AnswerError(f"the health answer names no rewards: {content[:80]!r}")
    return health


def _object(content: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"the answer is no JSON: {content[:80]!r}") from error
    if not isinstance(answer, dict) or answer.get("protocol") != PROTOCOL:
        seen = answer.get("protocol") if isinstance(answer, dict) else None
        raise AnswerError(f"the server speaks protocol {seen}, this client {PROTOCOL}; install one version on both")
    return answer


def as_result(value: Any, error: Any = None) -> Result:
    """What a server said of one picture, checked."""
    if error is not None:
        return Result(error=str(error)[:200])
    if value is None:
        return Result()
    if not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:  # NaN is no less than anything
        return Result(error=f"the server gave {str(value)[:80]!r}, which is no finite number")
    return Result(float(value))
