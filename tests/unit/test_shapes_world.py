"""The shapes world: captions and their keys, pictures pixel by pixel, and a judge that looks only at pixels."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageDraw

from gcpo_trl.shapes.grammar import (
    COLORS,
    INVERSE,
    SHAPES,
    TASKS,
    Item,
    Spec,
    all_specs,
    held_out_keys,
    held_out_specs,
    sample_specs,
    split_specs,
)
from gcpo_trl.shapes.renderer import GREY, IMAGE_SIZE, PALETTE, _related_slots, draw, flat, gradient, place, sprite
from reward_funcs.shapes import detect, inventory_score, judge_image, reward

SCENES = 150
ON_GREY = flat(random.Random(0))


def spec(tag, *items, relation=None):
    return Spec(tag, tuple(Item(*item) for item in items), relation)


# captions


@pytest.mark.parametrize(
    ("item", "phrase"),
    [
        (("circle",), "a circle"),
        (("circle", "orange"), "an orange circle"),
        (("hourglass",), "a hourglass"),  # by the letter, as GenEval does
        (("circle", None, 2), "two circles"),
        (("cross", None, 3), "three crosses"),
        (("hourglass", "orange", 4), "four orange hourglasses"),
    ],
)
def test_phrases(item, phrase):
    assert Item(*item).phrase() == phrase


@pytest.mark.parametrize(
    ("made", "prompt"),
    [
        (spec("two_object", ("ring",), ("bar",)), "a photo of a ring and a bar"),
        (spec("color_attr", ("ring", "red"), ("bar", "orange")), "a photo of a red ring and an orange bar"),
        # the second item stands left of the first
        (spec("position", ("ring",), ("bar",), relation="left of"), "a photo of a bar left of a ring"),
    ],
)
def test_prompts(made, prompt):
    assert made.prompt == prompt


def test_metadata_is_genevals():
    related = spec("position", ("ring",), ("bar",), relation="above").metadata
    assert related["include"] == [
        {"class": "ring", "count": 1},
        {"class": "bar", "count": 1, "position": ["above", 0]},
    ]
    assert "exclude" not in related
    counted = spec("counting", ("ring", "red", 3)).metadata
    assert counted["include"] == [{"class": "ring", "count": 3, "color": "red"}]
    assert counted["exclude"] == [{"class": "ring", "count": 4}]
    row = spec("counting", ("ring", "red", 3)).record()
    assert json.loads(row["metadata"]) == counted and row["prompt"] == "a photo of three red rings"


def test_prompts_that_ask_for_the_same_picture_share_a_key():
    ring, bar = ("ring",), ("bar",)
    assert spec("two_object", ring, bar).key == spec("two_object", bar, ring).key
    assert spec("two_object", ring, bar).key != spec("two_object", ring, ("heart",)).key
    for relation, inverse in INVERSE.items():
        there, back = spec("position", ring, bar, relation=relation), spec("position", bar, ring, relation=inverse)
        assert there.key == back.key != spec("position", bar, ring, relation=relation).key
    red_blue = spec("color_attr", ("ring", "red"), ("bar", "blue"))
    assert red_blue.key == spec("color_attr", ("bar", "blue"), ("ring", "red")).key
    assert red_blue.key != spec("color_attr", ("ring", "blue"), ("bar", "red")).key
    assert spec("counting", ("ring", None, 2)).key != spec("counting", ("ring", None, 3)).key


@pytest.mark.parametrize("tag", TASKS)
def test_held_out_prompts_share_no_key_with_training(tag):
    train, test = split_specs(tag)
    train_keys, test_keys = {s.key for s in train}, {s.key for s in test}
    assert not train_keys & test_keys
    assert train_keys | test_keys == {s.key for s in all_specs(tag)}
    assert test_keys == held_out_keys(tag) and len(test) == len(test_keys)
    assert len(test) >= (6 if tag == "single_object" else 40)
    assert not {s.prompt for s in train} & {s.prompt for s in test}
    assert len(train_keys) >= 6


def test_the_number_of_specs_is_what_the_grammar_allows():
    # 12 shapes, 8 colours: 12; 12 x 11; 12 x 9 x 3; 12 x 8; 12 x 11 x 4; 12 x 11 x 8 x 7
    assert len(SHAPES) == 12 and len(COLORS) == 8
    assert [len(all_specs(tag)) for tag in TASKS] == [12, 132, 324, 96, 528, 7392]
    with pytest.raises(ValueError, match="unknown task 'size'; the shapes world has single_object"):
        all_specs("size")


def test_training_samples_take_the_tasks_in_turn_and_never_a_held_out_key():
    specs = sample_specs(600, seed=1)
    assert Counter(s.tag for s in specs) == dict.fromkeys(TASKS, 100)
    held_out = {s.key for s in held_out_specs()}
    assert not {s.key for s in specs} & held_out
    assert [s.prompt for s in specs] == [s.prompt for s in sample_specs(600, seed=1)]
    assert {s.tag for s in sample_specs(10, 0, tasks=("counting",))} == {"counting"}


# pictures


def test_one_square_where_it_was_asked_for():
    # Slot (1, 2) of 12 pixels begins at row 12, column 24; a shape of 10 has a margin of 1.
    picture = np.asarray(place([("square", "red", (1, 2))], ON_GREY))
    assert (picture[13:23, 25:35] == PALETTE["red"]).all()
    outside = np.ones((IMAGE_SIZE, IMAGE_SIZE), dtype=bool)
    outside[13:23, 25:35] = False
    assert (picture[outside] == GREY).all()
    assert (ON_GREY == GREY).all()  # drawing left the background alone


def test_the_tokenizer_also_sees_vertical_gradients_of_greys():
    grey = gradient(random.Random(3))
    assert (grey[..., 0] == grey[..., 1]).all() and (grey == grey[:, :1]).all()
    steps = np.diff(grey[:, 0, 0])
    assert np.abs(steps - steps[0]).max() < 1e-3 and 128 <= grey.min() < grey.max() <= 172


def test_coverage_of_a_bar():
    # From 0.28 to 0.72 of 10 pixels: rows 3 to 6 whole, a fifth of rows 2 and 7, up to the supersampling of 1/8.
    rows = sprite("bar").mean(axis=1)
    assert (rows[3:7] == 1).all() and (rows[[0, 1, 8, 9]] == 0).all()
    assert np.abs(rows[[2, 7]] - 0.2).max() <= 1 / 8


def test_a_shape_and_its_area():
    # share of the square that a shape covers, by its formula
    areas = {"square": 1, "circle": np.pi / 4, "triangle": 1 / 2, "diamond": 1 / 2, "cross": 5 / 9, "frame": 3 / 4}
    areas |= {"bar": 0.44, "pillar": 0.44, "ring": np.pi / 4 * (1 - 0.46**2), "hourglass": 0.6}
    for shape, area in areas.items():
        assert abs(sprite(shape).mean() - area) < 0.03, shape
    with pytest.raises(ValueError, match="no drawing for shape 'star'; the shapes world has circle"):
        sprite("star")


@pytest.mark.parametrize("relation", INVERSE)
def test_related_slots_stand_in_their_relation(relation):
    axis, sign = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}[relation]
    generator = random.Random(0)
    for _ in range(50):
        first, second = _related_slots(relation, generator)
        along, across = sign * (second[axis] - first[axis]), abs(second[1 - axis] - first[1 - axis])
        assert along > across


def test_nine_shapes_do_not_touch():
    slots = [(row, column) for row in range(3) for column in range(3)]
    picture = place([("square", COLORS[i % 8], slot) for i, slot in enumerate(slots)], ON_GREY)
    assert [found["class"] for found in detect(picture)] == ["square"] * 9


# the detector, on pictures that are drawn here


def canvas(size=36, grey=150):
    picture = Image.new("RGB", (size, size), (grey, grey, grey))
    return picture, ImageDraw.Draw(picture)


def hand_drawn(name, color=(200, 30, 30)):
    """One shape of twelve pixels, drawn by hand at (10, 8)."""
    picture, pen = canvas()
    match name:
        case "square":
            pen.rectangle((10, 8, 21, 19), fill=color)
        case "circle":
            pen.ellipse((10, 8, 21, 19), fill=color)
        case "ring":
            pen.ellipse((10, 8, 21, 19), outline=color, width=3)
        case "frame":
            pen.rectangle((10, 8, 21, 19), outline=color, width=3)
        case "triangle":
            pen.polygon([(15.5, 8), (21, 19), (10, 19)], fill=color)
        case "diamond":
            pen.polygon([(15.5, 8), (21, 13.5), (15.5, 19), (10, 13.5)], fill=color)
        case "cross":
            pen.rectangle((14, 8, 17, 19), fill=color)
            pen.rectangle((10, 12, 21, 15), fill=color)
        case "bar":
            pen.rectangle((10, 12, 21, 16), fill=color)
        case "pillar":
            pen.rectangle((13, 8, 17, 19), fill=color)
        case "hourglass":
            pen.polygon([(10, 8), (21, 8), (17, 13.5), (21, 19), (10, 19), (14, 13.5)], fill=color)
    return picture


@pytest.mark.parametrize(
    "name", ["square", "circle", "ring", "frame", "triangle", "diamond", "cross", "bar", "pillar", "hourglass"]
)
def test_a_hand_drawn_shape_is_found(name):
    (found,) = detect(hand_drawn(name))
    assert (found["class"], found["color"]) == (name, "red")
    assert found["score"] > 0.8


def test_the_box_is_that_of_the_pixels():
    (found,) = detect(hand_drawn("square"))
    assert found["box"] == [10.0, 8.0, 22.0, 20.0]


@pytest.mark.parametrize(
    ("name", "color"),
    [("white", (250, 250, 250)), ("black", (5, 5, 5)), ("orange", (240, 130, 20)), ("purple", (130, 40, 170))],
)
def test_colours_are_the_nearest_of_the_palette(name, color):
    assert [found["color"] for found in detect(hand_drawn("circle", color))] == [name]


def test_an_empty_picture_and_specks_are_nothing():
    picture, pen = canvas()
    assert detect(picture) == []
    pen.rectangle((3, 3, 4, 5), fill=(200, 30, 30))  # six pixels
    assert detect(picture) == []


def test_two_shapes_are_two_and_a_blot_is_unknown():
    picture, pen = canvas(size=64)
    pen.ellipse((4, 4, 19, 19), fill=(38, 77, 217))
    pen.rectangle((30, 30, 45, 45), fill=(242, 217, 38))
    assert sorted((found["class"], found["color"]) for found in detect(picture)) == [
        ("circle", "blue"),
        ("square", "yellow"),
    ]
    picture, pen = canvas(size=64)
    pen.line([(4, 4), (60, 60)], fill=(200, 30, 30), width=2)
    assert [found["class"] for found in detect(picture)] == ["unknown"]


# the judge


@pytest.mark.parametrize("tag", TASKS)
def test_a_rendered_scene_is_judged_right_and_rejected_for_another_caption(tag):
    generator = random.Random(f"judge {tag}")
    pool = all_specs(tag)
    specs = [generator.choice(pool) for _ in range(SCENES)]
    pictures = [draw(made, generator) for made in specs]
    judged = [judge_image(picture, made.metadata) for picture, made in zip(pictures, specs, strict=True)]
    assert sum(judgement.exact for judgement in judged) / SCENES >= 0.97
    assert sum(judgement.correct for judgement in judged) / SCENES >= 0.97
    others = [next(s for s in iter(lambda: generator.choice(pool), None) if s.key != made.key) for made in specs]
    wrong = [judge_image(picture, other.metadata) for picture, other in zip(pictures, others, strict=True)]
    assert sum(judgement.exact == 0 for judgement in wrong) / SCENES >= 0.97


def found(name, color="red", left=0.0, top=0.0):
    return {"class": name, "color": color, "box": [left, top, left + 10, top + 10], "score": 1.0}


CIRCLE, RED_CIRCLE = {"class": "circle", "count": 1}, {"class": "circle", "count": 1, "color": "red"}
BLUE_SQUARE = {"class": "square", "count": 1, "color": "blue"}
LEFT = [{"class": "ring", "count": 1}, {"class": "bar", "count": 1, "position": ["left of", 0]}]


@pytest.mark.parametrize(
    ("asked", "detections", "score"),
    [
        ([CIRCLE], [found("circle")], 1.0),
        ([CIRCLE], [], 0.0),
        ([CIRCLE], [found("square")], 0.0),
        ([CIRCLE], [found("circle"), found("square")], 1 / 2),  # one too many: 1 of 2
        ([CIRCLE], [found("circle"), found("circle"), found("unknown")], 1 / 3),
        ([RED_CIRCLE], [found("circle", "blue")], 1 / 2),  # half for the class
        ([RED_CIRCLE], [found("square", "red")], 1 / 2),  # half for the colour
        ([RED_CIRCLE], [found("circle", "blue"), found("circle", "red")], 1 / 2),  # the better one, of two
        ([RED_CIRCLE, BLUE_SQUARE], [found("square", "blue"), found("circle", "red")], 1.0),
        ([RED_CIRCLE, BLUE_SQUARE], [found("circle", "blue"), found("square", "red")], 1 / 2),  # colours exchanged
        ([{"class": "circle", "count": 3}], [found("circle")] * 2, 2 / 3),
        ([{"class": "circle", "count": 2}], [found("circle")] * 3, 2 / 3),
        (LEFT, [found("bar", left=0), found("ring", left=20)], 1.0),
        (LEFT, [found("bar", left=20), found("ring", left=0)], 1 / 2),  # all there, on the wrong sides
        (LEFT, [found("ring")], 1 / 4),  # one of two, and a relation of one does not hold
        (LEFT, [found("bar", left=0), found("ring", left=20), found("ring", left=25)], 2 / 3),
    ],
)
def test_inventory_by_hand(asked, detections, score):
    assert inventory_score(detections, {"include": asked}) == pytest.approx(score, abs=1e-12)


def test_extra_objects_are_allowed_by_genevals_rule_and_not_by_ours():
    scene = [("circle", "red", (0, 0)), ("square", "blue", (2, 2))]
    judgement = judge_image(place(scene, ON_GREY), spec("single_object", ("circle",)).metadata)
    assert (judgement.correct, judgement.exact, judgement.inventory, judgement.extra) == (1.0, 0.0, 0.5, 1)
    judgement = judge_image(place(scene[:1], ON_GREY), spec("counting", ("circle", None, 2)).metadata)
    assert (judgement.correct, judgement.exact, judgement.inventory, judgement.extra) == (0.0, 0.0, 0.5, -1)


def test_the_reward_names_its_value():
    picture = place([("circle", "red", (0, 0)), ("square", "blue", (2, 2))], ON_GREY)
    described = json.dumps(spec("single_object", ("circle",)).metadata)
    ask = {"prompts": ["p"] * 2, "completions": [picture, None], "metadata": [described] * 2}
    assert reward(**ask) == [0.5, None]
    assert reward(**ask, value="exact") == [0.0, None] and reward(**ask, value="correct") == [1.0, None]
    with pytest.raises(ValueError, match="value='best' is unknown; choose one of inventory, exact, correct"):
        reward(**ask, value="best")
