"""Rewards by name, path or function, and their answers checked before anyone believes them."""

import asyncio
import inspect
import math
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from datasets import Dataset

import reward_funcs.shapes
from gcpo_trl.rewards.loading import ask_rewards, check_rewards, load_reward, load_rewards, place_rewards
from reward_funcs.runtime import reward_device

IMAGES = ["first", "second"]


def answering(answer):
    """A reward that gives ``answer`` whatever it is asked."""

    def made_up(prompts, completions, **columns):
        return answer

    return made_up


def ask(reward, **columns):
    return load_reward(reward)(prompts=["p", "q"], completions=IMAGES, **columns)


def lengths(prompts, completions, bonus=0.0, **columns):
    """A reward that reads the images and a column."""
    return [len(image) + extra for image, extra in zip(completions, bonus, strict=True)]


# loading


def test_a_name_is_a_file_of_reward_funcs():
    reward = load_reward("shapes")
    assert reward.__name__ == "shapes"
    assert reward.__wrapped__ is reward_funcs.shapes.reward


@pytest.mark.parametrize("path", ["reward_funcs.shapes:exact", "reward_funcs.shapes.exact"])
def test_a_path_is_an_attribute_of_a_module(path):
    reward = load_reward(path)
    assert reward.__name__ == "exact"  # the name under which TRL logs it
    assert reward.__wrapped__ is reward_funcs.shapes.exact


def test_a_function_keeps_its_name_and_receives_all_columns():
    assert load_reward(lengths).__name__ == "lengths"
    assert ask(lengths, bonus=[0.5, 1.0]) == [5.5, 7.0]


def test_an_object_with_a_call_is_a_reward():
    class Judge:
        def __call__(self, prompts, completions, **columns):
            return [1, 0]

    assert load_reward(Judge()).__name__ == "Judge"
    assert ask(Judge()) == [1.0, 0.0]


def test_a_torch_module_is_left_to_trl():
    module = torch.nn.Linear(1, 1)
    assert load_reward(module) is module


def test_an_unknown_name_gives_the_nearest():
    with pytest.raises(ValueError, match="no 'shape'; did you mean 'shapes'"):
        load_reward("shape")


def test_an_unknown_path_says_what_is_missing():
    with pytest.raises(ValueError, match="there is no module 'my_missing_package'"):
        load_reward("my_missing_package.mine:score")
    with pytest.raises(ValueError, match="has no 'exakt'; did you mean 'exact'"):
        load_reward("reward_funcs.shapes:exakt")


@pytest.mark.parametrize("reward", [None, 3])
def test_something_that_is_no_function_is_refused(reward):
    with pytest.raises(TypeError, match=f"is a {type(reward).__name__}; pass a name, a path or a function"):
        load_reward(reward)


def test_a_path_to_something_that_is_no_function_is_refused():
    with pytest.raises(TypeError, match="'VALUES' is a tuple"):
        load_reward("reward_funcs.shapes:VALUES")


def test_loading_twice_checks_once_more_and_keeps_the_name():
    reward = load_reward(load_reward("shapes"))
    assert reward.__name__ == "shapes"


# what a reward says of the dataset


def test_a_reward_looks_at_each_dataset_once(monkeypatch):
    seen = []
    monkeypatch.setattr(
        sys.modules[__name__], "check_rows", lambda dataset: seen.append(dataset["bonus"][0]), raising=False
    )
    one, two = (Dataset.from_dict({"bonus": [value]}) for value in (1, 2))
    rewards = [load_reward(reward) for reward in (lengths, answering([0.5]), "shapes", torch.nn.Linear(1, 1))]
    ask_rewards(
        rewards, {"one": one, "two": two}
    )  # two of the rewards are of this file; the others have nothing to say
    assert seen == [1, 2]
    for unread in (None, one.to_iterable_dataset(), [{"bonus": 3}]):
        ask_rewards(rewards, unread)
    assert seen == [1, 2]


# answers


def test_numbers_of_every_kind_become_floats():
    values = ask(answering([1, Fraction(1, 2)])) + ask(answering([True, np.float32(0.25)]))
    assert values == [1.0, 0.5, 1.0, 0.25]
    assert all(type(value) is float for value in values)
    assert ask(answering(torch.tensor([0.5, 2.0]))) == [0.5, 2.0]
    assert ask(answering((0, 1))) == [0.0, 1.0]


def test_none_stands_for_an_image_that_could_not_be_scored():
    assert ask(answering([None, 0.5])) == [None, 0.5]


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ([0.5], ValueError, "'made_up' returned 1 rewards for 2 images"),
        ([0.5] * 3, ValueError, "'made_up' returned 3 rewards for 2 images"),
        ([0.5, "high"], TypeError, "'made_up' gave 'high' for image 1"),
        ([{"score": 1}, 0.5], TypeError, "for image 0; give a number, or None"),
        ([0.5, math.nan], ValueError, "'made_up' gave nan for image 1; give a finite number, or None"),
        ([-math.inf, 0.5], ValueError, "'made_up' gave -inf for image 0"),
        (None, TypeError, "'made_up' returned a NoneType; return a list"),
        (0.5, TypeError, "'made_up' returned a float; return a list"),
        ({"a": 1.0, "b": 2.0}, TypeError, "returned a dict"),
        (torch.tensor([[1.0], [2.0]]), TypeError, r"gave \[1.0\] for image 0"),
    ],
)
def test_an_answer_that_is_no_list_of_numbers_is_refused(answer, error, words):
    with pytest.raises(error, match=words):
        ask(answering(answer))


def test_an_async_reward_is_awaited_and_checked():
    async def slow(prompts, completions, **columns):
        await asyncio.sleep(0)
        return [0.25, None]

    async def short(prompts, completions, **columns):
        return [0.25]

    assert inspect.iscoroutinefunction(load_reward(slow)) and load_reward(slow).__name__ == "slow"
    assert asyncio.run(ask(slow)) == [0.25, None]
    with pytest.raises(ValueError, match="'short' returned 1 rewards for 2 images"):
        asyncio.run(ask(short))


def test_an_object_with_an_async_call_is_awaited_too():
    class Server:
        async def __call__(self, prompts, completions, **columns):
            return [1.0, 2.0]

    assert inspect.iscoroutinefunction(load_reward(Server()))
    assert asyncio.run(ask(Server())) == [1.0, 2.0]


def test_what_a_reward_raises_is_not_hidden():
    def failing(prompts, completions, **columns):
        raise RuntimeError("server is down")

    with pytest.raises(RuntimeError, match="server is down"):
        ask(failing)


def test_check_rewards_leaves_its_argument_alone():
    rewards = [1, None]
    assert check_rewards("r", rewards, 2) == [1.0, None]
    assert rewards == [1, None]


# where their models load


def test_rewards_that_are_placed_load_there(monkeypatch):
    monkeypatch.setenv("GCPO_REWARD_DEVICE", "cuda:3")
    place_rewards("auto")  # leaves it to the environment
    assert reward_device("auto") == "cuda:3"
    place_rewards("cuda:1")
    assert reward_device("auto") == "cuda:1" and reward_device("cpu") == "cpu"


def test_a_function_called_reward_is_logged_as_its_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("warm_colours", "cold_colours"):
        (tmp_path / f"{name}.py").write_text("def reward(prompts, completions, **columns):\n    return [1.0]\n")
    loaded = load_rewards(["warm_colours:reward", "cold_colours.reward", "shapes"])
    assert [reward.__name__ for reward in loaded] == ["warm_colours", "cold_colours", "shapes"]


def test_rewards_that_would_share_a_name_are_refused():
    def reward(prompts, completions, **columns):
        return [1.0]

    with pytest.raises(ValueError, match=r"two rewards are called 'reward'.*rename its function"):
        load_rewards([reward, "shapes", reward])
