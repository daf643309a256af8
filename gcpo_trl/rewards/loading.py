"""Reward functions by name, and their answers checked before anyone believes them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
import math
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from reward_funcs.runtime import DEVICE_VARIABLE

from ..plugins import resolve

logger = logging.getLogger(__name__)

PACKAGE = "reward_funcs"


def load_rewards(rewards: Any, *datasets: Any, beside: bool = False) -> list[Any]:
    """One reward or a list of them, loaded, and ready side by side. No weight is loaded for it.

    Each has looked at each dataset, and one with a `check()` (a reward on a server) has been asked for it.
    """
    loaded = [load_reward(reward) for reward in (rewards if isinstance(rewards, list) else [rewards])]
    check_names(loaded)
    for dataset in datasets:
        ask_rewards(loaded, dataset)
    for reward in loaded:
        if hasattr(reward, "check"):
            reward.check()
    return side_by_side(loaded, beside)


def load_reward(reward: Any) -> Any:
    """The reward behind a name ("shapes"), a path ("my_pkg.mine:score") or a callable, with its answers checked.

    A named reward is logged under its name; torch modules pass through, TRL knows what to do with them.
    """
    if isinstance(reward, torch.nn.Module):
        return reward
    if isinstance(reward, str):
        function, name = resolve(reward, PACKAGE, "reward"), _name_of(reward)
    else:
        function, name = reward, getattr(reward, "__name__", type(reward).__name__)
    if not callable(function):
        raise TypeError(f"reward {name!r} is a {type(function).__name__}; pass a name, a path or a function")
    return _checked(function, name)


def _name_of(path: str) -> str:
    """What a reward is logged as: its file or function, or for a function called `reward` the module that holds it."""
    parts = path.replace(":", ".").split(".")
    return parts[-2] if parts[-1] == "reward" and len(parts) > 1 else parts[-1]


def check_names(rewards: Sequence[Any]) -> None:
    """Raise ValueError if two rewards would be logged under one name, where one would hide the other."""
    names = [getattr(reward, "__name__", None) for reward in rewards if not isinstance(reward, torch.nn.Module)]
    twice = sorted({name for name in names if name is not None and names.count(name) > 1})
    if twice:
        raise ValueError(
            f"two rewards are called {twice[0]!r}, and would be logged as one; leave one out or rename its function"
        )


def place_rewards(device: str) -> None:
    """Where the rewards of reward_funcs, which import nothing of ours, load their models; "auto" leaves it to them."""
    if device != "auto":
        os.environ[DEVICE_VARIABLE] = device


def ask_rewards(rewards: list[Any], dataset: Any) -> None:
    """Let each reward look at the dataset, if its module has a function `check_rows`.

    That function takes the dataset, reads columns by name and raises what is wrong. A stream is not read for it.
    """
    if isinstance(dataset, dict):  # several evaluation sets by name
        for part in dataset.values():
            ask_rewards(rewards, part)
    elif hasattr(dataset, "column_names") and hasattr(dataset, "__len__"):
        modules = [sys.modules.get(getattr(reward, "__module__", "")) for reward in rewards]
        # Not getattr: a module such as reward_funcs.remote makes up whatever it is asked for.
        for check in dict.fromkeys(vars(module).get("check_rows") for module in modules if module is not None):
            if check is not None:
                check(dataset)


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):

        async def awaited(*args: Any, **kwargs: Any) -> list[float | None]:
            return check_rewards(name, await function(*args, **kwargs), len(kwargs["completions"]))

        checked: Callable[..., Any] = awaited
    else:

        def called(*args: Any, **kwargs: Any) -> list[float | None]:
            return check_rewards(name, function(*args, **kwargs), len(kwargs["completions"]))

        checked = called
    functools.update_wrapper(checked, function)
    checked.__name__ = name
    if hasattr(function, "check"):
        checked.check = function.check  # type: ignore[attr-defined]
    return checked


def side_by_side(rewards: Sequence[Any], beside: bool = False) -> list[Any]:
    """Where some rewards are asynchronous, the others are made so: TRL then waits for all of them at once.

    These run one after another in one thread: two of them would compete for one GPU, and need the memory of both. On a
    GPU the thread has a stream of its own. beside: make them so in any case, to run beside what draws the images.
    """
    if not beside and not any(map(inspect.iscoroutinefunction, rewards)):
        return list(rewards)
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    start = {} if device is None else {"initializer": _on_gpu, "initargs": (device,)}
    thread = ThreadPoolExecutor(1, "reward", **start)
    ready = [isinstance(reward, torch.nn.Module) or inspect.iscoroutinefunction(reward) for reward in rewards]
    return [reward if done else _in_thread(reward, thread) for reward, done in zip(rewards, ready, strict=True)]


def _on_gpu(device: int) -> None:
    """For a new thread, whose current GPU is the first, whatever this rank's is, and whose stream is everybody's."""
    torch.cuda.set_device(device)
    torch.cuda.set_stream(torch.cuda.Stream())


def _in_thread(reward: Callable[..., Any], thread: ThreadPoolExecutor) -> Callable[..., Any]:
    """The reward as an asynchronous one, marked ``in_thread``."""

    @functools.wraps(reward)
    async def awaited(*args: Any, **kwargs: Any) -> Any:
        call = thread.submit(reward, *args, **kwargs)
        try:
            return await asyncio.wrap_future(call)
        finally:
            if call.running():  # cancelled, but a thread cannot be: whoever stops the reward waits for its end
                await asyncio.gather(asyncio.wrap_future(call), return_exceptions=True)

    awaited.in_thread = True  # type: ignore[attr-defined]
    return awaited


def check_rewards(name: str, rewards: Any, expected: int) -> list[float | None]:
    """The rewards as floats; raises ValueError or TypeError that names the function and what it returned."""
    if isinstance(rewards, torch.Tensor):
        rewards = rewards.tolist()
    if not isinstance(rewards, (list, tuple)):
        raise TypeError(f"reward {name!r} returned a {type(rewards).__name__}; return a list with one entry an image")
    if len(rewards) != expected:
        raise ValueError(f"reward {name!r} returned {len(rewards)} rewards for {expected} images; return one an image")
    for index, value in enumerate(rewards):
        if value is not None and not isinstance(value, Real):
            raise TypeError(f"reward {name!r} gave {value!r} for image {index}; give a number, or None if it failed")
        if value is not None and not math.isfinite(value):
            raise ValueError(f"reward {name!r} gave {value!r} for image {index}; give a finite number, or None")
    return [None if value is None else float(value) for value in rewards]


def without_partly_scored(rewards: Tensor, weights: Tensor) -> Tensor:
    """The rewards ``(batch, functions)`` with NaN in every row in which a function of weight other than 0 has NaN.

    TRL adds up what is there, so an image that one of several rewards failed to score would get a lower sum than its
    group, for nothing that it did; a row of NaN gets advantage zero and stays out of the group's mean.
    """
    missing = rewards.isnan()
    skipped = (missing & (weights != 0)).any(dim=1)
    if skipped.all() and not missing.all(dim=1).all():
        logger.warning(
            "no image of the batch was scored by every reward, so none trains; if the rewards are for different rows "
            "of the dataset, set reward_missing='partial'"
        )
    return rewards.masked_fill(skipped[:, None], math.nan)
