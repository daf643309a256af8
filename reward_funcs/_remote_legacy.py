"""The pickle protocol of Flow-GRPO's reward servers, for a server that cannot be replaced. Opt in, and know this:

PICKLE RUNS CODE. The server unpickles whatever anyone posts to it, so it must not be reachable by anyone but you; that
cannot be mended from here. What this client can do, it does: the answer is read by an unpickler that knows no names, so
it can build numbers, text, lists and dictionaries and nothing else, and the request is made of the same.

    POST /   pickle of {"images": [JPEG bytes], "prompts": [...], "meta_datas": [...], "only_strict": False}
    answer   pickle of {"scores": [...], "rewards": [...], "strict_rewards": [...], ...} or {"outputs": [...]}

Source: reward-server/app_geneval.py, app_deqa.py and flow_grpo/rewards.py. The protocol has no ids, no checksums and no
health: an answer of the right length is all that can be asked for. Pictures lose by JPEG, which those servers demand.
"""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Sequence
from typing import Any, NoReturn

from reward_funcs._remote_wire import AnswerError, Picture, Result, as_result

SCORE = "/"
CONTENT_TYPE = "application/octet-stream"


class BuiltinsOnly(pickle.Unpickler):
    """An unpickler that looks no name up, and so can neither import, nor call, nor build an object."""

    def find_class(self, module: str, name: str) -> NoReturn:
        """Refuse; every way of a pickle to reach code leads through here."""
        raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}; only numbers, text and lists are read")

    def persistent_load(self, pid: Any) -> NoReturn:
        """Refuse; no legacy server sends persistent ids."""
        raise pickle.UnpicklingError("the pickle refers to an object outside it")


def loads(content: bytes) -> Any:
    """A pickle of plain builtins. Raises AnswerError on anything else."""
    try:
        return BuiltinsOnly(io.BytesIO(content)).load()
    except Exception as error:  # a broken pickle raises nearly anything: EOFError, IndexError, MemoryError ...
        raise AnswerError(f"the answer is no plain pickle: {error}") from error


def body(pictures: Sequence[Picture], name: str) -> bytes:
    """The request; column `metadata`, JSON strings, becomes `meta_datas`."""
    request: dict[str, Any] = {"images": [_jpeg(picture) for picture in pictures], "only_strict": False}
    request["prompts"] = [picture.prompt for picture in pictures]
    if all("metadata" in picture.columns for picture in pictures):
        request["meta_datas"] = [json.loads(picture.columns["metadata"]) for picture in pictures]
    return pickle.dumps(request)


def read(content: bytes, pictures: Sequence[Picture], name: str) -> dict[str, Result]:
    """Result of each picture by id; ``name`` is the key of the answer that is the reward."""
    answer = loads(content)
    values = answer.get(name) if isinstance(answer, dict) else None
    if not isinstance(values, list):
        keys = sorted(map(str, answer)) if isinstance(answer, dict) else type(answer).__name__
        raise AnswerError(f"the answer has no list {name!r}, but {keys}; name one of those as the reward")
    if len(values) != len(pictures):
        raise AnswerError(f"{len(values)} values for {len(pictures)} pictures")
    return {picture.id: as_result(value) for picture, value in zip(pictures, values, strict=True)}


def _jpeg(picture: Picture) -> bytes:
    buffer = io.BytesIO()
    picture.image.convert("RGB").save(buffer, format="JPEG")  # quality 75, as Flow-GRPO's client
    return buffer.getvalue()
