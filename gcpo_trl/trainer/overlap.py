"""What is done with the images of a chunk while the next one is drawn: they are decoded, and rewards see them.

    chunk drawn -> pictures -> rewards that run beside training, asked once for each stretch of whole groups

A GPU decodes in a stream of its own. A CPU decodes at once: its cores are those that draw.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..policies.decoding.image_head import to_pictures

NO_COLUMNS = ("prompt", "completion", "completion_ids")  # of a dataset: TRL passes these itself, or not at all


@functools.cache
def decoding_stream(device: torch.device) -> Any:
    """One a device for good, because memory that one stream has freed serves no other; None on a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def decoded(policy: Any, tokens: Tensor, stream: Any, thread: ThreadPoolExecutor) -> Future[list[Any]]:
    """Pictures of finished ``tokens``: at once, or in ``stream`` if there is one while ``thread`` waits for them.

    All kernels are started here, none in ``thread``: autocast is this thread's, and where parts of the decoder are
    sharded, ranks talk to one another in the same order. The weights must stay until the pictures are there.
    """
    if stream is None:
        pictures: Future[list[Any]] = Future()
        pictures.set_result(policy.decode(tokens))
        return pictures
    stream.wait_stream(torch.cuda.current_stream(tokens.device))  # which wrote the tokens
    with torch.cuda.stream(stream):
        pixels = policy.pixels(tokens)
    tokens.record_stream(stream)  # their memory is not given away while the stream reads it
    return thread.submit(_fetched, pixels, stream)


def _fetched(pixels: Tensor, stream: Any) -> list[Any]:
    with torch.cuda.stream(stream):  # a thread has its own, in which a copy would not wait for the decoder
        return to_pictures(pixels)


def starts_early(reward: Any, device: torch.device) -> bool:
    """Whether a reward is asked before all is drawn: it is asynchronous, and leaves a CPU that draws alone.

    On a CPU a function that only a thread made asynchronous computes on the cores that draw; on a GPU it does not, and
    has its own stream. A torch module is TRL's.
    """
    in_thread = getattr(reward, "in_thread", False)
    return inspect.iscoroutinefunction(reward) and not (in_thread and device.type == "cpu")


class _Logged:
    """What a reward logs about ``count`` images, kept until all of them are scored."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.columns: defaultdict[str, list[Any]] = defaultdict(list)
        self.metrics: list[tuple[str, float]] = []

    def extra(self, column: str, values: list[Any]) -> None:
        self.columns[column].extend(values)

    def metric(self, name: str, value: float) -> None:
        self.metrics.append((name, value))


class EarlyRewards:
    """The rewards of one generation that are asked before TRL asks, with what TRL would pass: a context.

    rewards: by their place in ``reward_funcs``; they run in ``loop``. rows: of the dataset, one an image. group: images
    of a prompt. Each reward is asked for whole groups, one call at a time, in order; for all at once where this rank's
    images are no whole number of groups, because then a group spans ranks. Leaving the context stops what still runs.
    """

    def __init__(self, rewards: Mapping[int, Any], rows: Sequence[Any], group: int, state: Any, loop: Any) -> None:
        self._rewards, self._rows, self._state, self._loop = rewards, rows, state, loop
        self._unit = group if len(rows) % group == 0 else len(rows)
        self._ids: list[list[int]] = []
        self._pictures: list[Future[list[Any]]] = []
        self._asked = 0  # images
        self._answers: dict[int, list[Future[Any]]] = {place: [] for place in rewards}
        self._logged: dict[int, list[_Logged]] = {place: [] for place in rewards}
        self._tasks: list[Any] = []

    def add(self, ids: list[list[int]], pictures: Future[list[Any]]) -> None:
        """The next images: their tokens and, some time, their pictures."""
        self._ids += ids
        self._pictures.append(pictures)
        whole = len(self._ids) // self._unit * self._unit
        if whole == self._asked:
            return
        images, self._asked = slice(self._asked, whole), whole
        for place, reward in self._rewards.items():
            logged, before = _Logged(whole - images.start), self._answers[place][-1:]
            answer = self._answer(reward, images, list(self._pictures), self._arguments(images, logged), before)
            self._logged[place].append(logged)
            self._answers[place].append(asyncio.run_coroutine_threadsafe(answer, self._loop))

    def _arguments(self, images: slice, logged: _Logged) -> dict[str, Any]:
        """What TRL passes beside the pictures."""
        rows = self._rows[images]
        return {
            "prompts": [row["prompt"] for row in rows],
            "completion_ids": self._ids[images],
            **{key: [row[key] for row in rows] for key in self._rows[0] if key not in NO_COLUMNS},
            "trainer_state": self._state,
            "log_extra": logged.extra,
            "log_metric": logged.metric,
        }

    async def _answer(
        self, reward: Any, images: slice, pictures: list[Future[Any]], arguments: dict[str, Any], before: list[Any]
    ) -> Any:
        self._tasks.append(asyncio.current_task())
        for call in before:  # a reward that remembers, as one on a server does, is asked one thing at a time
            # Shielded: else, cancelled here, it would cancel that call once more, while it tidies up.
            await asyncio.shield(asyncio.wrap_future(call))
        drawn = chain.from_iterable([await asyncio.wrap_future(chunk) for chunk in pictures])
        return await reward(completions=list(drawn)[images], **arguments)

    def answers(self) -> dict[int, Callable[..., Any]]:
        """Stand-ins for the rewards, which only wait: for TRL to call."""
        return {place: functools.partial(self._all_of, calls) for place, calls in self._answers.items()}

    @staticmethod
    async def _all_of(calls: list[Future[Any]], **_: Any) -> list[Any]:
        return list(chain.from_iterable([await asyncio.wrap_future(call) for call in calls]))

    def log(self, log_extra: Callable[..., Any], log_metric: Callable[..., Any]) -> None:
        """Pass on what the rewards logged, reward by reward, image by image, whichever was done first."""
        for calls in self._logged.values():
            for column in dict.fromkeys(chain.from_iterable(call.columns for call in calls)):
                for call in calls:  # a call may have had nothing to say, but a column is as long as the batch
                    log_extra(column, call.columns.get(column, [None] * call.count))
            for name, value in chain.from_iterable(call.metrics for call in calls):
                log_metric(name, value)

    def __enter__(self) -> EarlyRewards:
        return self

    def __exit__(self, *_: Any) -> None:
        if not all(call.done() for calls in self._answers.values() for call in calls):
            asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()

    async def _stop(self) -> None:
        """Cancel what runs, and wait until it has seen that: nothing of it meets the next generation."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
