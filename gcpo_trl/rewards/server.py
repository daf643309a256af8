"""Rewards over HTTP, for `reward_funcs.remote`: JSON and PNG in, JSON out, nothing that could run.

    POST /score   scores a batch; the protocol is in reward_funcs/_remote_wire.py
    GET /health   version, rewards, their golden scores, limits; answers also while a batch is being scored

A picture that cannot be opened is an error of its own and the rest is scored. A reward that raises on a batch is one
HTTP 500 for the batch: the client halves it. The client must be able to do that anyway, because a picture may also take
the whole process down; so it is done there alone, under the client's deadline.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import inspect
import io
import json
import logging
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import Depends, FastAPI, HTTPException, Request
from PIL import Image
from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError
from starlette.requests import ClientDisconnect

from reward_funcs._remote_wire import CONTENT_TYPE, HEALTH, PROTOCOL, SCORE

from .. import __version__

logger = logging.getLogger(__name__)

Reward = Callable[..., Any]


@dataclass(frozen=True)
class Limits:
    """What a client may ask for. A picture's pixels are counted before any is unpacked."""

    bytes: int = 64 * 2**20  # of a request; 32 pictures of 384 x 384 are 19 MB even if they are noise
    images: int = 256
    pixels: int = 2048 * 2048  # of one picture
    waiting: int = 32  # requests being read or scored; further ones are told to come again
    read_seconds: float = 60.0  # for a request to arrive


class Item(BaseModel):
    """A picture as it arrives."""

    model_config = ConfigDict(extra="forbid", strict=True)
    id: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    sha256: str
    png: str
    prompt: str
    columns: dict[str, Any] = {}


class Batch(BaseModel):
    """A request as it arrives."""

    model_config = ConfigDict(extra="forbid", strict=True)
    protocol: Literal[1]
    reward: str
    images: list[Item]


@dataclass(frozen=True)
class Golden:
    """A picture with its row of the dataset, whose score tells one set of weights from another."""

    image: Image.Image
    prompt: str
    columns: Mapping[str, Any]


def default_goldens() -> list[Golden]:
    """A red disc on grey, once with the metadata of the shapes world and once with that of GenEval's."""
    y, x = np.mgrid[:256, :256]
    pixels = np.full((256, 256, 3), 150, np.uint8)
    pixels[np.hypot(x - 127.5, y - 127.5) < 80] = (219, 41, 41)
    asked = [{"class": name, "count": 1, "color": "red"} for name in ("circle", "sports ball")]
    return [
        Golden(
            Image.fromarray(pixels),
            f"a photo of a red {clause['class']}",
            {"metadata": json.dumps({"tag": "colors", "include": [clause]})},
        )
        for clause in asked
    ]


def read_golden(file: Path) -> Golden:
    """The golden picture of a JSON file: {"image": path from the file's folder, "prompt": text, "columns": {...}}."""
    row = json.loads(file.read_text())
    if not isinstance(row, dict) or not {"image", "prompt"} <= set(row):
        raise ValueError(f"{file} must hold an object with 'image', 'prompt' and, if the reward reads any, 'columns'")
    with Image.open(file.parent / row["image"]) as image:
        return Golden(image.convert("RGB"), row["prompt"], row.get("columns", {}))


def golden_score(reward: Reward, goldens: Sequence[Golden]) -> dict[str, Any]:
    """{"golden": score of the first picture whose columns the reward takes, "error": why there is none}.

    Weights that cannot be loaded are not caught: a server that cannot score must not start.
    """
    error = ""
    for golden in goldens:
        columns = {key: [value] for key, value in golden.columns.items()}
        try:
            return {"golden": call(reward, [golden.prompt], [golden.image], columns)[0], "error": None}
        except (ValueError, TypeError, KeyError) as mistake:  # classes of another world, columns that it lacks
            error = str(mistake)
    return {"golden": None, "error": error}


def call(reward: Reward, prompts: list[str], images: list[Any], columns: Mapping[str, list[Any]]) -> list[float | None]:
    """The reward's answer, also of one that is asynchronous."""
    values = reward(prompts=prompts, completions=images, **columns)
    answer: list[float | None] = asyncio.run(values) if inspect.iscoroutine(values) else values
    return answer


def open_picture(item: Item, limits: Limits) -> Image.Image:
    """The picture of an item. Raises ValueError saying what is wrong with it."""
    data = base64.b64decode(item.png, validate=True)
    if hashlib.sha256(data).hexdigest() != item.sha256:
        raise ValueError("its bytes do not have its SHA-256")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is lower
        image = Image.open(io.BytesIO(data), formats=["PNG"])
    if image.width * image.height > limits.pixels:
        raise ValueError(f"it has {image.width} x {image.height} pixels, more than {limits.pixels}")
    image.load()
    return image


def score_batch(reward: Reward, batch: Batch, limits: Limits) -> list[dict[str, Any]]:
    """One result an item, in their order. What the reward raises goes through."""
    images: dict[int, Image.Image] = {}
    errors: dict[int, str] = {}
    for index, item in enumerate(batch.images):
        try:
            images[index] = open_picture(item, limits)
        except Exception as error:  # a broken file makes Pillow raise SyntaxError, struct.error and more
            logger.warning("picture %r is refused: %s", item.id, error)
            errors[index] = f"the picture is refused: {error}"
    values: dict[int, float | None] = {}
    if images:
        rows = [batch.images[index] for index in images]
        names = dict.fromkeys(name for row in rows for name in row.columns)
        columns = {name: [row.columns.get(name) for row in rows] for name in names}
        answer = call(reward, [row.prompt for row in rows], list(images.values()), columns)
        values = dict(zip(images, answer, strict=True))
    return [
        {"id": item.id, "value": values.get(index), "error": errors.get(index)}
        for index, item in enumerate(batch.images)
    ]


class Desk:
    """Takes requests one by one for each reward, so that none of them runs twice at a time; different ones overlap."""

    def __init__(self, rewards: Mapping[str, Reward], limits: Limits) -> None:
        self.rewards, self.limits = rewards, limits
        self.locks = {name: asyncio.Lock() for name in rewards}
        self.waiting = 0

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place in the queue; HTTP 503 if it is full, before anything is read."""
        if self.waiting >= self.limits.waiting:
            raise HTTPException(503, f"{self.waiting} requests are waiting; come again")
        self.waiting += 1
        try:
            yield
        finally:
            self.waiting -= 1

    async def read(self, request: Request) -> Batch:
        """The batch, checked against schema and limits."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for piece in request.stream():
                    body += piece
                    if len(body) > self.limits.bytes:
                        raise HTTPException(413, f"the request is longer than {self.limits.bytes} bytes; send fewer")
        except TimeoutError as error:
            raise HTTPException(408, f"the request took longer than {self.limits.read_seconds:g} s") from error
        try:
            batch = await asyncio.to_thread(Batch.model_validate_json, bytes(body))
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            raise HTTPException(422, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
        if len(batch.images) > self.limits.images:
            raise HTTPException(413, f"{len(batch.images)} pictures, more than {self.limits.images}; send fewer")
        if batch.reward not in self.rewards:
            raise HTTPException(404, f"there is no reward {batch.reward!r}; here are {', '.join(self.rewards)}")
        return batch

    async def score(self, batch: Batch, request: Request) -> list[dict[str, Any]]:
        """The results, from a thread; HTTP 500 with the error's text if the reward raises."""
        async with self.locks[batch.reward]:
            if await request.is_disconnected():  # its client gave up while it waited
                raise HTTPException(499, "the client is gone")
            try:
                return await asyncio.to_thread(score_batch, self.rewards[batch.reward], batch, self.limits)
            except Exception as error:  # whatever it is, the client decides what follows; here it goes to the log
                logger.exception("%s failed on %d pictures", batch.reward, len(batch.images))
                raise HTTPException(500, f"{batch.reward}: {type(error).__name__}: {error}"[:500]) from error


def build_app(
    rewards: Mapping[str, Reward],
    goldens: Mapping[str, Mapping[str, Any]],
    token: str = "",
    limits: Limits | None = None,
) -> FastAPI:
    """The application. goldens: answers of `golden_score` by name. token: asked of every request unless empty."""
    limits = limits or Limits()
    desk = Desk(rewards, limits)

    def allowed(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
            raise HTTPException(401, "the bearer token is missing or wrong", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(allowed)])

    @app.get(HEALTH)
    async def health() -> dict[str, Any]:
        return {"protocol": PROTOCOL, "version": __version__, "rewards": goldens, "limits": asdict(limits)}

    @app.post(SCORE)
    async def score(request: Request) -> dict[str, Any]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip()
        if kind != CONTENT_TYPE:  # also keeps web pages out: a browser asks first before it posts JSON elsewhere
            raise HTTPException(415, f"Content-Type {kind!r} is not accepted; send {CONTENT_TYPE}")
        async with desk.place():
            try:
                batch = await desk.read(request)
            except ClientDisconnect as error:
                raise HTTPException(499, "the client is gone") from error
            return {"protocol": PROTOCOL, "results": await desk.score(batch, request)}

    return app
