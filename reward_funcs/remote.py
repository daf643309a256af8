"""A reward that another machine computes, served by `gcpo serve-rewards`.

In a recipe, for the reward that the server calls "geneval":

    reward_funcs: ["reward_funcs.remote:geneval"]
    env: {"REMOTE_REWARD_URL": "http://127.0.0.1:8000"}

or `reward_funcs: ["remote"]` with REMOTE_REWARD_NAME. In Python, one object a server and reward:

    Remote(url="http://127.0.0.1:8000", name="geneval", deadline=60.0)

It is asynchronous: a trainer asks several of them at once. A picture that the server could not score is None; a server
that fails too much is an error (RemoteRewardError). `Server` has the settings, `_remote_client.py` the rules.
"""

from __future__ import annotations

import asyncio
import functools
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from reward_funcs._remote_client import Client, RemoteRewardError, Server
from reward_funcs._remote_wire import Picture
from reward_funcs.runtime import check_images, prompt_text

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["Remote", "RemoteRewardError", "Server", "reward"]

NOT_SENT = ("completion_ids", "environments")  # what TRL passes beside the dataset's columns


class Remote:
    """A reward on a server; the options are those of `Server`, and are read, with the environment, on first use.

    columns: names of the dataset's columns that go to the server; None sends all.
    """

    def __init__(self, columns: Sequence[str] | None = None, **options: Any) -> None:
        self.columns = columns
        self.options = options
        self.memory_bytes = 0  # on this machine
        self.__name__ = options.get("name", "remote")

    @functools.cached_property
    def client(self) -> Client:
        """The client, which remembers between calls whether the server answers."""
        return Client(Server(**self.options))

    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Image | None], **columns: Any
    ) -> list[float | None]:
        """The server's value of each picture; None where the picture is None or was lost."""
        check_images(self.__name__, completions, prompts=prompts)
        sent = sent_columns(columns, len(completions), self.columns)
        call = uuid.uuid4().hex  # an answer to another call is no answer to this one
        pictures = {
            index: Picture(
                f"{call}-{index}", image, prompt_text(prompts[index]), {key: sent[key][index] for key in sent}
            )
            for index, image in enumerate(completions)
            if image is not None
        }
        results = await self.client.score(list(pictures.values())) if pictures else {}
        return [results[pictures[i].id].value if i in pictures else None for i in range(len(completions))]

    def check(self) -> None:
        """Raise RemoteRewardError unless the server is up and has this reward; a trainer calls it before it loads."""
        with ThreadPoolExecutor(1) as pool:  # a notebook's own event loop forbids another in its thread
            pool.submit(asyncio.run, self.client.check()).result()


def sent_columns(columns: Mapping[str, Any], count: int, names: Sequence[str] | None) -> dict[str, list[Any]]:
    """The columns to send: lists of one JSON value a picture."""
    lists = {key: value for key, value in columns.items() if isinstance(value, list) and key not in NOT_SENT}
    if names is not None:
        if missing := set(names) - set(lists):
            raise ValueError(f"columns={list(names)}, but the dataset has no {', '.join(sorted(missing))}")
        lists = {key: lists[key] for key in names}
    for key, values in lists.items():
        if len(values) != count:
            raise ValueError(f"column {key!r} has {len(values)} entries for {count} pictures; give one each")
        for value in values:
            if not is_json(value):
                raise TypeError(
                    f"column {key!r} holds a {type(value).__name__}, which JSON cannot; name the columns to send, "
                    "as in Remote(columns=['metadata'])"
                )
    return lists


def is_json(value: Any) -> bool:
    """Whether JSON holds the value as it is."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_json(one) for key, one in value.items())
    return all(map(is_json, value)) if isinstance(value, list) else isinstance(value, (str, int, float, type(None)))


reward = Remote()


def __getattr__(name: str) -> Remote:
    """`remote:geneval` is the reward that the server calls geneval, so that a recipe can name several."""
    if name.startswith("_"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return Remote(name=name)
