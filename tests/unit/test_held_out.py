"""The parts of the held-out look that need no model: the rule, the measures, the split, and what is refused."""

import logging
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from gcpo_trl import HeldOutCallback
from gcpo_trl.monitoring.held_out import (
    Change,
    Measured,
    prompt_rows,
    randomness_kept,
    reduce,
    reward_hacking,
    sharpness,
    split,
)

RISING = [0.1, 0.2, 0.3, 0.6, 0.7, 0.8]


def brightness(prompts, completions, **columns):
    return [float(np.asarray(image).mean()) for image in completions]


# reward hacking


def test_a_measure_that_falls_as_reward_rises_is_named():
    changes = {
        "hpsv2": Change(start=0.30, now=0.26, error=0.001, share=0.1),  # 13 % lost
        "shapes": Change(start=0.50, now=0.48, error=0.001, share=0.1),  # 4 %
        "sharpness": Change(start=0.02, now=0.005, error=0.0001, share=0.4),  # 75 %
        "entropy": Change(start=3.0, now=2.0, error=0.01, share=0.5),  # a third
    }
    assert reward_hacking(RISING, changes) == ["hpsv2", "sharpness"]


FALLEN = {"sharpness": Change(start=1.0, now=0.1, error=0.0, share=0.4)}


@pytest.mark.parametrize(
    "training",
    [
        [],
        [0.1, 0.2, 0.8, 0.9, 1.0],  # two at either end are too few to tell
        [0.5] * 40,
        RISING[::-1],
        # Neighbours differ by 0.4, so one step's noise is 0.4 / sqrt 2 = 0.28, and two standard errors of the
        # difference of means of 3 are 2 x 0.28 x sqrt(2/3) = 0.46; the rise is 0.13.
        [0.2, 0.6, 0.2, 0.6, 0.2, 0.6],
    ],
)
def test_without_a_rise_nothing_is_named(training):
    assert reward_hacking(training, FALLEN) == []


def test_a_rise_must_exceed_its_noise():
    # Means of 3 at either end are 0.2 and 0.7. Squared differences of RISING: 0.01 x 4 + 0.09, mean 0.026, so noise is
    # sqrt 0.013 = 0.114 and two standard errors are 2 x 0.114 x sqrt(2/3) = 0.186 < 0.5.
    assert reward_hacking(RISING, FALLEN) == ["sharpness"]
    # Means 0.2 and 0.367. Squared differences: 0.09 x 4 + 0.25, mean 0.122; two standard errors are 0.40 > 0.167.
    assert reward_hacking([0.1, 0.4, 0.1, 0.4, 0.1, 0.6], FALLEN) == []


def test_only_the_ends_of_a_long_series_count():
    # 10 steps at either end: 0 to 1; what happened between is another story.
    assert reward_hacking([0.0] * 10 + [0.9] * 30 + [1.0] * 10, FALLEN) == ["sharpness"]
    assert reward_hacking([1.0] * 10 + [0.0] * 30 + [1.0] * 10, FALLEN) == []


def test_a_fall_must_exceed_its_noise():
    # Half of a reward of 0.4 is lost, but on few images: 2 x sqrt 2 x 0.1 = 0.28 > 0.2.
    assert reward_hacking(RISING, {"a": Change(0.4, 0.2, error=0.1, share=0.1)}) == []
    assert reward_hacking(RISING, {"a": Change(0.4, 0.2, error=0.07, share=0.1)}) == ["a"]  # 0.198
    assert reward_hacking(RISING, {"a": Change(0.4, 0.2, error=math.inf, share=0.1)}) == []  # a single image


def test_a_measure_may_start_at_nothing_or_below():
    assert reward_hacking(RISING, {"a": Change(0.0, -0.1, error=0.01, share=0.1)}) == ["a"]
    assert reward_hacking(RISING, {"a": Change(0.0, 0.0, error=0.0, share=0.1)}) == []
    assert reward_hacking(RISING, {"a": Change(-1.0, -1.05, error=0.0, share=0.1)}) == []
    assert reward_hacking(RISING, {"a": Change(-1.0, -1.2, error=0.0, share=0.1)}) == ["a"]


def looks(callback, caplog, values):
    """Messages of looks at which sharpness was ``values``, one a look, while reward rises."""
    history = [{"reward": reward} for reward in RISING]
    messages = []
    for step, value in enumerate(values):
        caplog.clear()
        history.append({"gcpo/held_out/sharpness": value, "step": step})
        callback._warn(SimpleNamespace(global_step=step, log_history=history), {"sharpness": Measured(value, 0.0)})
        messages.append([record.getMessage() for record in caplog.records])
    return messages


def test_a_crossing_is_told_once_and_again_after_a_recovery(caplog):
    caplog.set_level(logging.WARNING, logger="gcpo_trl")
    callback = HeldOutCallback(brightness, ["a"])
    told = looks(callback, caplog, [1.0, 0.5, 0.4, 0.9, 0.5])
    assert [len(messages) for messages in told] == [0, 1, 0, 0, 1]
    assert "step 1: the training reward has risen" in told[1][0] and "sharpness fell from 1 to 0.5" in told[1][0]
    assert "raise beta" in told[1][0]


# measures


def test_sharpness_is_the_variance_of_the_laplacian():
    # One white pixel: the Laplacian is -4 there and 1 at its neighbour; (2.5)^2 about the mean of -1.5.
    pixels = np.zeros((3, 4, 3), dtype=np.uint8)
    pixels[1, 1] = 255
    assert_close(sharpness(Image.fromarray(pixels)), 6.25, rtol=0, atol=1e-9)
    # Green alone has 0.587 of the light.
    pixels[1, 1] = (0, 255, 0)
    assert_close(sharpness(Image.fromarray(pixels)), 6.25 * 0.587**2, rtol=0, atol=1e-9)


def test_blank_and_even_slopes_are_not_sharp():
    assert sharpness(Image.new("RGB", (8, 8), (90, 20, 200))) == pytest.approx(0.0, abs=1e-12)
    slope = np.repeat(np.arange(8, dtype=np.uint8)[None, :, None] * 10, 8, axis=0).repeat(3, axis=2)
    assert sharpness(Image.fromarray(slope)) == pytest.approx(0.0, abs=1e-12)
    assert sharpness(Image.new("RGB", (2, 2))) == 0.0


def test_samples_are_split_evenly_and_counted_once():
    # 7 samples on 3 ranks: 3 each; the last rank draws sample 6 three times and counts it once.
    assert [split(7, rank, 3) for rank in range(3)] == [([0, 1, 2], 3), ([3, 4, 5], 3), ([6, 6, 6], 1)]
    assert split(1, 1, 2) == ([0], 0)
    assert split(6, 0, 1) == ([0, 1, 2, 3, 4, 5], 6)


class Ranks:
    """An accelerator whose other rank has these sums, sums of squares and counts."""

    device = torch.device("cpu")

    def __init__(self, others):
        self.others = torch.tensor(others)

    def reduce(self, sums, reduction):
        assert reduction == "sum"
        return sums + self.others


def test_means_are_of_all_images_whatever_the_rank():
    # 1 and 3 here, 8 there: the mean is 4, not the mean of 2 and 8. Variance (9 + 1 + 16) / 2 = 13; error sqrt(13 / 3).
    one = reduce(Ranks([[8.0, 64.0, 1.0]]), {"a": [1.0, None, 3.0]})["a"]
    assert_close((one.mean, one.error), (4.0, math.sqrt(13 / 3)), rtol=0, atol=1e-6)


def test_what_no_image_has_is_absent_and_one_image_has_no_error():
    alone = reduce(Ranks([[0.0, 0.0, 0.0]] * 2), {"none": [None, None], "one": [2.0, None]})
    assert alone == {"one": Measured(2.0, math.inf)}


def test_random_numbers_go_on_as_if_nothing_had_drawn_any():
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    with pytest.raises(RuntimeError, match="broken reward"), randomness_kept():
        assert draw() == expected
        raise RuntimeError("broken reward")
    assert draw() == expected


# mistakes


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"rewards": []}, ValueError, "rewards is empty.*'shapes'"),
        ({"rewards": "shape"}, ValueError, "did you mean 'shapes'"),
        ({"rewards": [brightness, brightness]}, ValueError, "two held-out measures are called 'brightness'"),
        ({"rewards": torch.nn.Linear(1, 1)}, TypeError, "Linear is a torch module.*pass a function"),
        ({"rewards": 3}, TypeError, "pass a name, a path or a function"),
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"prompts": "a cat"}, TypeError, "prompts is a str; write a list"),
        ({"prompts": 3}, TypeError, "prompts is a int; write a list"),
        ({"prompts": [3]}, TypeError, r"prompts\[0\] is a int"),
        ({"prompts": [{"caption": "a"}]}, ValueError, r"\['caption'\] but no 'prompt'"),
        ({"prompts": [{"prompt": "a"}, {"prompt": "b", "tag": 1}]}, ValueError, r"prompts\[1\].*\['prompt', 'tag'\]"),
        ({"images_per_prompt": 0}, ValueError, "images_per_prompt=0 must be >= 1"),
        ({"every": 0}, ValueError, "every=0 must be >= 1.*such as 50"),
        ({"every": 2.5}, TypeError, "every=2.5 is no whole number"),
        ({"seed": -1}, ValueError, "seed=-1"),
        ({"guidance": float("nan")}, ValueError, "guidance=nan.*finite"),
    ],
    ids=str,
)
def test_a_mistake_is_refused_at_once(arguments, error, words):
    with pytest.raises(error, match=words):
        HeldOutCallback(**({"rewards": brightness, "prompts": ["a"]} | arguments))


def test_prompts_may_be_strings_or_rows():
    assert prompt_rows(["a", "b"]) == [{"prompt": "a"}, {"prompt": "b"}]
    assert prompt_rows(iter([{"prompt": "a", "tag": 1}])) == [{"prompt": "a", "tag": 1}]


def test_another_trainer_is_refused():
    with pytest.raises(TypeError, match="needs GCPOTrainer"):
        HeldOutCallback(brightness, ["a"]).on_train_begin(None, SimpleNamespace(log_history=[]), None)
