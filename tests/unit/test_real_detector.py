"""Photographs, a detector with real weights and GenEval's rule, end to end. The weights: `make weights`."""

from pathlib import Path

import pytest
import skimage
import torch
from centernet import depthwise, detect, twice_as_large
from PIL import Image
from torch.testing import assert_close

from reward_funcs.geneval import judge

PHOTOS = Path(skimage.__file__).parent / "data"  # these come inside the scikit-image wheel


def asks(*names, tag="two_object", **more):
    return {"tag": tag, "include": [{"class": name, "count": 1, **more} for name in names]}


@pytest.fixture(scope="module")
def seen():
    """Detections of each photograph."""
    return {name: detect(Image.open(PHOTOS / name)) for name in ("astronaut.png", "motorcycle_left.png", "coffee.png")}


@pytest.mark.parametrize(
    ("photo", "classes", "correct"),
    [
        ("astronaut.png", ["person"], True),
        ("astronaut.png", ["dog"], False),
        ("motorcycle_left.png", ["motorcycle"], True),
        ("motorcycle_left.png", ["motorcycle", "person"], False),
        ("coffee.png", ["cup", "dining table"], True),
        ("coffee.png", ["cup", "dog"], False),
    ],
)
def test_photograph_is_judged_by_what_it_shows(seen, photo, classes, correct):
    assert judge(seen[photo], asks(*classes)).correct is correct


def test_thresholds_of_the_rule_are_the_options_of_a_weaker_detector(seen):
    # The motorcycle is found at about .49: not enough for a counting prompt (.9), unless the threshold says so.
    asked = asks("motorcycle", tag="counting")
    assert not judge(seen["motorcycle_left.png"], asked).correct
    verdict = judge(seen["motorcycle_left.png"], asked, counting_threshold=0.4)
    assert (verdict.correct, verdict.strict, verdict.score) == (True, True, 1.0)
    ((left, top, right, bottom, score),) = verdict.kept["motorcycle"]
    assert score == pytest.approx(0.493, abs=0.01)
    # By eye: the wheels reach from about x = 110 to 680, the handlebar and the ground from y = 55 to 450.
    assert (left, top, right, bottom) == pytest.approx((115, 56, 675, 449), abs=10)


def test_coffee_is_where_it_is(seen):
    # One cup of several overlapping readings is kept under suppression; it stands on the table, so neither is beside.
    cup = {"class": "cup", "count": 1}
    for relation in ("left of", "right of"):
        asked = {
            "tag": "position",
            "include": [{"class": "dining table", "count": 1}, cup | {"position": [relation, 0]}],
        }
        assert not judge(seen["coffee.png"], asked).correct
    twice = {"tag": "counting", "include": [cup | {"count": 2}]}
    assert judge(seen["coffee.png"], twice, counting_threshold=0.3).correct  # .47 and .36, the same cup
    assert not judge(seen["coffee.png"], twice, counting_threshold=0.3, max_overlap=0.5).correct


def test_tensorflow_padding_puts_the_odd_pixel_behind():
    # 4 pixels, kernel 3, stride 2: 2 outputs need 5 pixels, so one 0 is added at the right. 1 + 2 + 3, 3 + 4 + 0.
    same = {"padding": {"s": "U0FNRQ=="}, "strides": {"list": {"i": ["1", "2", "2", "1"]}}}
    found = depthwise(same, torch.tensor([[[[1.0, 2, 3, 4]]]]).expand(1, 1, 4, 4), torch.ones(3, 3, 1, 1))
    assert_close(found, torch.tensor([[[[18.0, 21], [12, 14]]]]), rtol=0, atol=1e-6)


def test_tensorflow_resize_keeps_the_even_pixels():
    pixels = torch.tensor([[[[0.0, 2.0]]]])
    row = [0.0, 1.0, 2.0, 2.0]
    assert_close(twice_as_large({}, pixels, torch.tensor([2, 4])), torch.tensor([[[row, row]]]), rtol=0, atol=0)
