"""Reward functions by name, and their answers checked before anyone believes them."""

from __future__ import annotations

import functools
import inspect
import math
import os
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch

from reward_funcs._runtime import DEVICE_VARIABLE

from .plugins import resolve

PACKAGE = "reward_funcs"


def load_rewards(rewards: Any, *datasets: Any) -> list[Any]:
    """One reward or a list of them, loaded, after each has looked at each dataset. No weight is loaded for it."""
    loaded = [load_reward(reward) for reward in (rewards if isinstance(rewards, list) else [rewards])]
    for dataset in datasets:
        ask_rewards(loaded, dataset)
    return loaded


def load_reward(reward: Any) -> Any:
    """The reward behind a name ("shapes"), a path ("my_pkg.mine:score") or a callable, with its answers checked.

    A named reward is logged under its name; torch modules pass through, TRL knows what to do with them.
    """
    if isinstance(reward, torch.nn.Module):
        return reward
    if isinstance(reward, str):
        function, name = resolve(reward, PACKAGE, "reward"), reward.rpartition(":")[-1].rpartition(".")[-1]
    else:
        function, name = reward, getattr(reward, "__name__", type(reward).__name__)
    if not callable(function):
        raise TypeError(f"reward {name!r} is a {type(function).__name__}; pass a name, a path or a function")
    return _checked(function, name)


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
        for check in dict.fromkeys(getattr(module, "check_rows", None) for module in modules):
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
    return checked


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
