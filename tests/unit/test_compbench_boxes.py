"""2D-spatial and numeracy on boxes a reader can place: pictures are 479 x 479, the evaluator's frame, unless said.

tests/data/compbench_vectors.jsonl holds random boxes with what determine_position and calculate_iou, as released in
Karine-Huang/T2I-CompBench at 1b70949, return for them.
"""

import json
from pathlib import Path

import pytest
from PIL import Image

from reward_funcs import _compbench_geometry as geometry
from reward_funcs import numeracy, spatial_2d
from reward_funcs.spatial_2d import BoxDetector, Models, Relation, Verdict

VECTORS = [json.loads(line) for line in (Path(__file__).parents[1] / "data/compbench_vectors.jsonl").open()]
FRAME = (479, 479)


def found(name, x0, y0, x1, y1, score=1.0):
    return {"class": name, "box": (x0, y0, x1, y1), "score": score}


def detector(*detections, classes=None, calls=None):
    """A detector that sees the same in every picture."""

    def find(images, nouns):
        if calls is not None:
            calls.append((len(images), [list(each) for each in nouns]))
        return [[box for box in detections if box["class"] in each] for each in nouns]

    return Models(detector=BoxDetector("by hand", classes, find))


@pytest.mark.parametrize("vector", [line for line in VECTORS if "place" in line])
def test_place_equals_the_released_determine_position(vector):
    place = geometry.published_place(vector["words"], vector["first"], vector["second"])
    assert place == pytest.approx(vector["place"], rel=0, abs=1e-12)


@pytest.mark.parametrize("vector", [line for line in VECTORS if "same" in line])
def test_same_object_equals_the_released_calculate_iou(vector):
    assert geometry.same_object(vector["first"], vector["second"]) == vector["same"]


# Boxes of side 100; the second's centre is at (250, 250).
SECOND = (200, 200, 300, 300)


@pytest.mark.parametrize(
    ("words", "first", "place"),
    [
        ("on the left of", (50, 210, 150, 310), 1.0),
        ("on the left of", (350, 210, 450, 310), 0.0),
        ("on the right of", (350, 210, 450, 310), 1.0),
        ("on the top of", (210, 50, 310, 150), 1.0),
        ("on the bottom of", (210, 350, 310, 450), 1.0),
        ("on the bottom of", (210, 50, 310, 150), 0.0),
        ("on the left of", (50, 50, 150, 150), 0.0),  # a tie of the axes is neither
        ("on the top of", (50, 50, 150, 150), 0.0),
        ("on the left of", (50, 51, 150, 151), 1.0),  # 150 across, 149 up
        ("on the left of", SECOND, 0.0),  # the same box
        # 40 to the left: 60 x 100 in common of 14000, IoU 3/7, so 0.1 / (3/7)
        ("on the left of", (160, 200, 260, 300), 0.7 / 3),
        # 90 to the left: 1000 of 19000, IoU 1/19 < 0.1
        ("on the left of", (110, 200, 210, 300), 1.0),
        ("on the left of", (10, 250, 10, 250), 1.0),  # an empty box has no IoU
    ],
)
def test_sides_are_the_same_as_released_and_corrected(words, first, place):
    assert geometry.published_place(words, first, SECOND) == pytest.approx(place, rel=0, abs=1e-12)
    assert geometry.corrected_place(words, first, SECOND) == pytest.approx(place, rel=0, abs=1e-12)


def test_an_iou_of_exactly_a_tenth_is_no_longer_free():
    # 11 x 10 boxes 9 apart: 2 x 10 in common of 200, IoU 0.1 -> 0.1 / 0.1.
    assert geometry.iou((0, 0, 11, 10), (9, 0, 20, 10)) == 0.1
    assert geometry.published_place("on the left of", (0, 0, 11, 10), (9, 0, 20, 10)) == 1.0
    # 12 x 10 boxes 9 apart: 30 of 210, IoU 1/7 -> 0.7.
    assert geometry.published_place("on the left of", (0, 0, 12, 10), (9, 0, 21, 10)) == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize("words", ["near", "next to", "on side of"])
@pytest.mark.parametrize(
    ("offset", "published", "corrected"),
    [
        ((149, 0), 1.0, 1.0),
        ((120, 160), 1.0, 0.75),  # distance 200; one axis is closer than 150
        ((400, 0), 1.0, 0.375),  # opposite ends of one row
        ((150, 200), 0.75, 0.6),  # 150 / 200, and 150 / 250
        ((0, 0), 1.0, 1.0),
    ],
)
def test_near(words, offset, published, corrected):
    second = (offset[0], offset[1], offset[0] + 10, offset[1] + 10)
    assert geometry.published_place(words, (0, 0, 10, 10), second) == pytest.approx(published, rel=0, abs=1e-12)
    assert geometry.corrected_place(words, (0, 0, 10, 10), second) == pytest.approx(corrected, rel=0, abs=1e-12)


@pytest.mark.parametrize(
    ("words", "first"),
    [
        ("on top of", (210, 50, 310, 150)),
        ("above", (210, 50, 310, 150)),
        ("below", (210, 350, 310, 450)),
        ("to the left of", (50, 210, 150, 310)),
    ],
)
def test_relations_without_a_branch_score_only_when_corrected(words, first):
    assert geometry.published_place(words, first, SECOND) == 0.0
    assert geometry.corrected_place(words, first, SECOND) == 1.0
    assert geometry.corrected_place(words, SECOND, first) == 0.0


def test_score_is_a_quarter_of_each_confidence_and_half_the_place():
    boxes = [found("cat", 0, 0, 100, 100, 0.8), found("dog", 300, 0, 400, 100, 0.6)]
    # .25 * .8 + .25 * .6 + .5 = .85 and, the other way round, .35, which the cut makes 0
    left = spatial_2d.judge(boxes, Relation("cat", "on the left of", "dog"), FRAME)
    assert left == Verdict(*[pytest.approx(0.85, abs=1e-12)] * 3)
    right = spatial_2d.judge(boxes, Relation("cat", "on the right of", "dog"), FRAME)
    assert right == Verdict(0.0, 0.0, pytest.approx(0.35, abs=1e-12))


def test_one_object_none_and_a_score_of_exactly_a_half():
    relation = Relation("cat", "near", "dog")
    one = [found("dog", 0, 0, 100, 100, 0.9)]
    assert spatial_2d.judge(one, relation, FRAME) == Verdict(0.0, 0.0, pytest.approx(0.225, abs=1e-12))
    assert spatial_2d.judge([], relation, FRAME) == Verdict(0.0, 0.0, 0.0)
    assert (geometry.cut(0.5), geometry.cut(0.4999)) == (0.5, 0.0)


def test_the_most_confident_box_of_a_noun_counts_in_any_order():
    boxes = [found("cat", 400, 0, 450, 50, 0.6), found("dog", 200, 0, 250, 50, 0.9), found("cat", 0, 0, 50, 50, 0.7)]
    verdict = spatial_2d.judge(boxes, Relation("cat", "on the left of", "dog"), FRAME)
    assert verdict.published == pytest.approx(0.25 * 0.7 + 0.25 * 0.9 + 0.5, abs=1e-12)


def test_near_is_judged_in_the_evaluators_frame_whatever_the_pictures_size():
    # A quarter and a half of the side apart on both axes: 0.25 * 479 < 150 < 0.5 * 479 = 239.5, so 1 and 150 / 239.5.
    for side in (1, 100, 1024):
        for share, place in ((0.25, 1.0), (0.5, 150 / 239.5)):
            apart = side * share
            boxes = [found("cat", 0, 0, 0, 0), found("dog", apart, apart, apart, apart)]
            verdict = spatial_2d.judge(boxes, Relation("cat", "near", "dog"), (side, side))
            assert verdict.published == pytest.approx(0.5 + place / 2, abs=1e-12)


def test_frame_is_479_on_the_short_side_and_at_most_480_on_the_long_one():
    def scaled(size):
        return geometry.in_frame([found("cat", 0, 0, 1, 1)], size)[0]["box"][2]

    assert scaled((958, 958)) == 0.5
    assert scaled((240, 120)) == 2.0  # the long side stops it
    assert scaled((120, 240)) == 2.0


def test_two_objects_of_one_class_are_two_boxes_when_corrected():
    boxes = [found("person", 300, 0, 400, 100, 0.8), found("person", 0, 0, 100, 100, 0.6)]
    asked = Relation("person", "on the left of", "person")
    # As released both are the 0.8 box: .2 + .2, no offset, below the cut. Corrected, in one order: .2 + .15 + .5.
    assert spatial_2d.judge(boxes, asked, FRAME) == Verdict(0.0, *[pytest.approx(0.85, abs=1e-12)] * 2)
    assert spatial_2d.judge(boxes[:1], asked, FRAME).graded == pytest.approx(0.2, abs=1e-12)


def picture(side=479):
    return Image.new("RGB", (side, side))


def test_spatial_reward_reads_the_prompt_or_the_column_and_leaves_out_what_it_cannot_judge():
    calls = []
    models = detector(found("cat", 0, 0, 100, 100, 0.8), found("dog", 300, 0, 400, 100, 0.6), calls=calls)
    prompts = ["a cat on the left of a dog", "a cat", "a cat on the left of a dog", "a cat on top of a dog", "x"]
    column = [None, None, None, None, json.dumps({"relation": ["dog", "on the right of", "cat"]})]
    images = [picture(), picture(), None, picture(), picture(958)]
    rewards = spatial_2d.reward(prompts, images, column, models=models)
    # The last picture is twice as wide, so the boxes are half as far apart, still side by side.
    assert rewards == [pytest.approx(0.85, abs=1e-12), None, None, 0.0, pytest.approx(0.85, abs=1e-12)]
    assert calls == [(3, [["cat", "dog"]] * 3)]
    assert spatial_2d.graded(prompts[3:4], images[3:4], models=models) == [pytest.approx(0.35, abs=1e-12)]
    assert spatial_2d.corrected(["a dog beside a cat"], images[:1], models=models) == [
        pytest.approx(0.35 + 0.25, abs=1e-12)  # centres 300 apart: half of 150 / 300
    ]


def test_a_noun_the_detector_does_not_know_is_not_scored():
    boxes = [found("person", 0, 0, 100, 100), found("couch", 300, 0, 400, 100)]
    models = detector(*boxes, classes=frozenset({"person", "couch", "computer mouse"}))
    prompts = ["a girl on the left of a sofa", "a girl on the left of a mouse", "a bee near a girl"]
    # girl -> person, sofa -> couch; the benchmark's mouse is the animal
    assert spatial_2d.reward(prompts, [picture()] * 3, models=models) == [1.0, None, None]
    prompts = ["one girl and one sofa", "two boys and a woman", "six bees"]
    # boys and the woman are three persons, of whom one is found: half
    assert numeracy.reward(prompts, [picture()] * 3, models=models) == [1.0, 0.5, None]


def test_labels_name_the_detector():
    assert spatial_2d.label(Models(detector="some/detector")) == "2D-spatial (detector=some/detector)"
    assert numeracy.label(detector()) == "numeracy (detector=by hand)"


def test_a_value_or_a_column_of_the_wrong_size_is_an_error_before_any_model():
    with pytest.raises(ValueError, match="value='fixed'; write one of published, corrected, graded"):
        spatial_2d.reward(["a cat near a dog"], [picture()], value="fixed")
    for reward in (spatial_2d.reward, numeracy.reward):
        with pytest.raises(ValueError, match="2 compbench for 1 completions"):
            reward(["a cat near a dog"], [picture()], [None, None])
        with pytest.raises(ValueError, match="is not a JSON string"):
            reward(["a cat near a dog"], [picture()], ["{"])


# Numeracy: k nouns, 1/(2k) for each that is there, 1/(2k) more where the count is right.


@pytest.mark.parametrize(
    ("counts", "value"),
    [
        ({"cat": 2, "dog": 1}, 1.0),
        ({"cat": 3, "dog": 1}, 0.75),  # cats are there but are not three
        ({"cat": 2, "dog": 1, "cow": 1}, 2 / 3),
        ({"cow": 1}, 0.0),
        ({"cat": 1}, 0.5),
    ],
)
def test_numeracy(counts, value):
    boxes = [found("cat", 0, 0, 50, 50), found("cat", 100, 0, 150, 50), found("dog", 0, 100, 50, 150)]
    assert numeracy.judge(boxes, counts, FRAME) == pytest.approx(value, rel=0, abs=1e-12)


def test_duplicates_count_once():
    big = found("cat", 0, 0, 199, 199, 0.9)  # 200 x 200 with the last pixel
    inside = found("cat", 50, 50, 99, 99, 0.8)  # all of it in the big one
    mostly = found("cat", 150, 0, 249, 99, 0.7)  # half of it
    other = found("dog", 0, 0, 199, 199, 0.6)  # another class in the same place
    assert geometry.without_duplicates([big, inside, mostly, other]) == [big, mostly, other]
    assert numeracy.judge([mostly, inside, big], {"cat": 2}, FRAME) == 1.0
    # Nine tenths exactly, 90 of 100 columns: two objects; 91: one.
    wide = (0, 0, 99, 9)
    assert not geometry.same_object(wide, (10, 0, 109, 9))
    assert geometry.same_object(wide, (9, 0, 108, 9))


def test_numeracy_reward_reads_counts_and_leaves_out_prompts_without():
    models = detector(found("cat", 0, 0, 50, 50), found("cat", 100, 0, 150, 50))
    prompts = ["two cats", "three cats and a dog", "the sky", "two cats", "x"]
    column = [None, None, None, None, json.dumps({"counts": {"cat": 2}})]
    images = [picture(), picture(), picture(), None, picture()]
    assert numeracy.reward(prompts, images, column, models=models) == [1.0, 0.25, None, None, 1.0]


def test_suppression_keeps_the_best_of_overlapping_boxes_of_a_class():
    # 10 x 10 boxes 2 apart: 80 of 120, IoU 2/3.
    best, worse, dog = found("cat", 0, 0, 10, 10, 0.9), found("cat", 2, 0, 12, 10, 0.8), found("dog", 0, 0, 10, 10, 0.1)
    assert geometry.suppress([dog, worse, best], 0.5) == [best, dog]
    assert geometry.suppress([dog, worse, best], 0.7) == [best, worse, dog]
