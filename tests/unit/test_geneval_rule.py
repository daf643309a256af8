"""GenEval's rule against recorded verdicts of the released code, by hand, and against wrong readings of it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from reward_funcs import _geneval_rule as rule
from reward_funcs.geneval import judge, relative_position, validate_metadata

# Each line: detections, metadata, options, and what the two released evaluators said of them; numbers float32-exact.
VECTORS = [json.loads(line) for line in (Path(__file__).parents[1] / "data/geneval_vectors.jsonl").open()]
SQUARE = (0.0, 0.0, 100.0, 100.0)
CAT = {"class": "cat", "box": SQUARE, "score": 0.75, "color": "red"}
DOG = {"class": "dog", "box": SQUARE, "score": 0.5, "color": "red"}
KEPT = {"cat": [[*SQUARE, 0.75]], "dog": [[*SQUARE, 0.5]]}
# By hand, what no line above has.
BY_HAND = [
    {  # an excluded object beside objects that are exactly right: the server ignores `exclude`
        "detections": [CAT, DOG],
        "metadata": {
            "tag": "single_object",
            "include": [{"class": "cat", "count": 1}],
            "exclude": [{"class": "dog", "count": 1}, {"class": "cow", "count": 1}],  # one exceeded is enough
        },
        "official": {"correct": False, "kept": KEPT},
        "server": {"strict": True, "score": 1.0},
    },
    {  # two red cats asked, one is blue: the count term is 1, the colour term 1 - |2 - 1| / 2
        "detections": [CAT, {**CAT, "color": "blue", "score": 0.5}],
        "metadata": {"tag": "colors", "include": [{"class": "cat", "count": 2, "color": "red"}]},
        "official": {"correct": False, "kept": {"cat": [[*SQUARE, 0.75], [*SQUARE, 0.5]]}},
        "server": {"strict": False, "score": 0.75},
    },
]
KNOWN = [*VECTORS, *({"options": {}} | case for case in BY_HAND)]


def agrees(vector):
    """Whether the verdict equals the recorded ones; the server's was recorded without options only."""
    verdict = rule.judge(vector["detections"], vector["metadata"], **vector["options"])
    official, server = vector["official"], vector["server"]
    return (
        verdict.kept == official["kept"]
        and verdict.correct == official["correct"]
        and (server is None or (verdict.strict == server["strict"] and abs(verdict.score - server["score"]) <= 1e-12))
    )


@pytest.mark.parametrize("vector", VECTORS, ids=lambda v: f"{v['id']}-{v['family']}")
def test_verdict_equals_released_code(vector):
    verdict = judge(vector["detections"], vector["metadata"], **vector["options"])
    assert verdict.kept == vector["official"]["kept"]
    assert verdict.correct is vector["official"]["correct"]
    if vector["server"] is not None:
        assert verdict.strict is vector["server"]["strict"]
        assert verdict.score == pytest.approx(vector["server"]["score"], rel=0, abs=1e-12)


# Wrong readings. Each replaces one small function or constant of the rule and must disagree with some known verdict.


def margins(direction):
    x, y = direction
    return {"left of": -x, "right of": x, "above": -y, "below": y}


def some_pair(relation, found, targets, threshold):
    return any(relation in relative_position(a["box"], b["box"], threshold) for a in found for b in targets)


def judge_with_strict_exclude(detections, metadata, **options):
    verdict = judge(detections, metadata, **options)
    return dataclasses.replace(
        verdict, strict=verdict.strict and not rule.exceeded(verdict.kept, metadata.get("exclude", []))
    )


def first_boxes_kept(detections, threshold, most, overlap):
    by_class = {}
    for found in detections:
        by_class.setdefault(found["class"], []).append(found)
    return keep_boxes([found for boxes in by_class.values() for found in boxes[:most]], threshold, most, overlap)


def server_reads_top_boxes(clause, found, *rest):
    return server_clause(clause, found[: clause["count"]], *rest)


relations_of, keep_boxes, exceeded, every_pair = rule.relations_of, rule.keep_boxes, rule.exceeded, rule.every_pair
server_clause, count_color = rule.server_clause, rule.count_color
MUTANTS = {
    "threshold kept at equality": ("above", lambda scores, t: scores >= np.float32(t)),
    "threshold in float64": ("above", lambda scores, t: scores.astype(float) > t),
    "0.3 for counting too": ("threshold_for", lambda metadata, numbers: numbers.threshold),
    "no cap on boxes": ("keep_boxes", lambda found, t, cap, most: keep_boxes(found, t, 10**6, most)),
    "suppression ignored": ("suppress", lambda ranked, most: list(ranked)),
    "first boxes kept, not the most confident": ("keep_boxes", first_boxes_kept),
    "boxes of the least confidence first": ("keep_boxes", lambda *a: {n: b[::-1] for n, b in keep_boxes(*a).items()}),
    "overlap without + 1": ("pixels", lambda box: np.prod(np.maximum(box[2:] - box[:2], 0))),
    "every kept box looked at": ("looked_at", lambda boxes, count: list(boxes)),
    "least confident boxes looked at": ("looked_at", lambda boxes, count: list(boxes[-count:])),
    "no dead zone": ("relative_position", lambda a, b, t: relative_position(a, b, 0.0)),
    "offset divided by its shrunk length": ("relations_of", lambda d: relations_of(d / np.linalg.norm(d))),
    "margin 0.4999": ("RELATION_MARGIN", 0.4999),
    "strongest relation only": ("relations_of", lambda d: {max(margins(d), key=margins(d).get)} & relations_of(d)),
    "above and below swapped": ("relations_of", lambda d: relations_of(d * np.array([1, -1]))),
    "one pair is enough": ("every_pair", some_pair),
    "object and reference swapped": ("every_pair", lambda name, a, b, t: every_pair(name, b, a, t)),
    "dead zone of half the sizes": ("relative_position", lambda a, b, t: relative_position(a, b, t / 2)),
    "one right colour is enough": ("count_color", lambda found, c: len(found) * bool(count_color(found, c))),
    "colour ignored": ("count_color", lambda found, color: len(found)),
    "exclude ignored": ("exceeded", lambda kept, exclude: False),
    "exclude beyond its count": (
        "exceeded",
        lambda kept, exclude: exceeded(kept, [{**clause, "count": clause["count"] + 1} for clause in exclude]),
    ),
    "every exclude clause must be exceeded": (
        "exceeded",
        lambda kept, exclude: bool(exclude) and all(exceeded(kept, [clause]) for clause in exclude),
    ),
    "server looks at the most confident boxes only": ("server_clause", server_reads_top_boxes),
    "strict reads exclude": ("judge", judge_with_strict_exclude),
    "missed position scores 0": ("released_position_terms", rule.fixed_position_terms),
    "count term clamped": ("closeness", lambda found, count: max(1 - abs(count - found) / count, 0)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_reading_is_noticed(name, monkeypatch):
    assert all(agrees(vector) for vector in KNOWN)
    monkeypatch.setattr(rule, *MUTANTS[name])
    assert not all(agrees(vector) for vector in KNOWN)


# By hand


def seen(name, score=0.95, box=SQUARE, **extra):
    return {"class": name, "box": box, "score": score, **extra}


def asks(*include, tag="two_object", **extra):
    return {"tag": tag, "include": [{"count": 1} | clause for clause in include], **extra}


def test_a_3_4_5_triangle_holds_two_relations():
    # Zero area, so no dead zone: offset (60, 80), length 100, direction (0.6, 0.8), both above 0.5.
    assert relative_position((60, 80, 60, 80), (0, 0, 0, 0)) == {"right of", "below"}
    assert relative_position((0, 0, 0, 0), (60, 80, 60, 80)) == {"left of", "above"}


@pytest.mark.parametrize(("offset", "relations"), [(40, set()), (41, {"right of"}), (-41, {"left of"})])
def test_dead_zone_of_two_100_pixel_boxes_is_40_pixels(offset, relations):
    # Shrunk by 0.1 * (100 + 100) = 20, divided by the unshrunk offset: 20 / 40 = 0.5 is not above 0.5; 21 / 41 is.
    assert relative_position((offset, 0, offset + 100, 100), SQUARE) == relations


def test_same_place_has_no_relation():
    assert relative_position(SQUARE, SQUARE) == set()


def test_threshold_is_a_float32():
    # float32(0.3) = 0.300000012 > 0.3 in float64, yet not above the float32 threshold.
    nearest = float(np.float32(0.3))
    higher = float(np.nextafter(np.float32(0.3), np.float32(1)))
    assert nearest > 0.3
    assert rule.keep_boxes([seen("cat", nearest)], 0.3) == {}
    assert rule.keep_boxes([seen("cat", higher)], 0.3) == {"cat": [seen("cat", higher)]}


def test_kept_boxes_are_the_16_most_confident_first():
    scores = [0.5 + i / 64 for i in range(20)]
    kept = rule.keep_boxes([seen("cat", score) for score in scores], 0.3)["cat"]
    assert [box["score"] for box in kept] == scores[::-1][:16]


def test_overlap_counts_both_border_pixels():
    # 11 x 11 each; shared 6 x 11 = 66; 66 / (121 + 121 - 66) = 0.375. Without + 1: 50 / 150.
    assert rule.overlap((100, 100, 110, 110), (105, 100, 115, 110)) == 0.375


def test_boxes_overlapping_by_the_limit_are_suppressed():
    ranked = [seen("cat", 0.9, (100, 100, 110, 110)), seen("cat", 0.8, (105, 100, 115, 110))]
    assert rule.suppress(ranked, 0.375) == ranked[:1]
    assert rule.suppress(ranked, 0.376) == ranked
    assert rule.suppress([ranked[0], ranked[0]], 1.0) == [ranked[0], ranked[0]]


def test_extra_object_is_correct_but_not_strict():
    verdict = judge([seen("cat"), seen("cat", 0.5)], asks({"class": "cat"}, tag="single_object"))
    assert (verdict.correct, verdict.strict, verdict.score) == (True, False, 0.0)  # 1 - |1 - 2| / 1


def test_counting_needs_0_9_and_obeys_exclude():
    asked = asks({"class": "cat", "count": 2}, tag="counting", exclude=[{"class": "cat", "count": 3}])
    assert judge([seen("cat"), seen("cat"), seen("cat", 0.85)], asked).correct
    assert not judge([seen("cat"), seen("cat"), seen("cat", 0.95)], asked).correct
    assert not judge([seen("cat"), seen("cat"), seen("cat", 0.85)], asked, counting_threshold=0.8).correct


def test_scores_of_a_missed_position():
    asked = asks({"class": "cat"}, {"class": "dog", "position": ["left of", 0]}, tag="position")
    verdict = judge([seen("cat"), seen("dog", box=(300, 0, 400, 100))], asked)
    assert (verdict.correct, verdict.strict) == (False, False)
    assert verdict.score == 3 / 4  # cat 1, dog 1, position 0 and, as released, 1
    assert verdict.score_fixed == 2 / 3  # cat 1, dog 1, position 0


def test_scores_of_a_right_position():
    asked = asks({"class": "cat"}, {"class": "dog", "position": ["right of", 0]}, tag="position")
    verdict = judge([seen("cat"), seen("dog", box=(300, 0, 400, 100))], asked)
    assert (verdict.correct, verdict.strict, verdict.score, verdict.score_fixed) == (True, True, 1.0, 1.0)


def test_missing_object_with_color_and_position_adds_one_zero():
    asked = asks({"class": "cat"}, {"class": "dog", "color": "red", "position": ["left of", 0]}, tag="position")
    assert judge([seen("cat")], asked).score == 1 / 3  # cat 1, dog 0, one 0 for both


def test_score_is_unbounded_below_and_the_fixed_one_is_not():
    verdict = judge([seen("cat", 0.5)] * 16, asks({"class": "cat"}))
    assert verdict.score == -14  # 1 - |1 - 16| / 1
    assert verdict.score_fixed == 0


def test_color_is_read_from_the_most_confident_boxes_only():
    asked = asks({"class": "cat", "color": "red"}, tag="colors")
    red, blue = {"color": "red"}, {"color": "blue"}
    assert not judge([seen("cat", 0.5, **red), seen("cat", 0.9, **blue)], asked).correct
    assert judge([seen("cat", 0.9, **red), seen("cat", 0.5)], asked).correct  # the second one needs no colour


def test_missing_color_is_an_error():
    with pytest.raises(ValueError, match="'color' key"):
        judge([seen("cat")], asks({"class": "cat", "color": "red"}))


def test_metadata_may_be_json():
    asked = asks({"class": "cat"}, tag="single_object")
    assert judge([seen("cat")], json.dumps(asked)) == judge([seen("cat")], asked)


def test_unknown_option_is_an_error():
    with pytest.raises(ValueError, match="'nms'; write one of threshold"):
        judge([], asks({"class": "cat"}), nms=0.5)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ("[]", "list; write one JSON object"),
        ({"include": []}, "no 'tag'"),
        ({"tag": "count", "include": []}, "tag='count'; write one of single_object"),
        ({"tag": "counting"}, "neither 'include' nor 'exclude'"),
        ({"tag": "counting", "include": [], "extra": 1}, "unknown key 'extra'"),
        (asks({"class": "cat", "colour": "red"}), r"include\[0\] has the unknown key 'colour'"),
        (asks({"count": 1}), r"include\[0\] has no 'class'"),
        (asks({"class": "cat", "count": 0}), "count=0; write a whole number of at least 1"),
        (asks({"class": "cat", "count": 1.5}), "count=1.5"),
        (asks(exclude=[{"class": "cat", "count": -1}]), r"exclude\[0\] count=-1"),
        (asks(exclude=[{"class": "cat", "count": 1, "color": "red"}]), r"exclude\[0\] has the unknown key 'color'"),
        (asks({"class": "cat", "position": ["left of", 0]}), "clause 0; write the clause after"),
        (asks({"class": "cat"}, {"class": "dog", "position": ["left of", 1]}), "clause 1; write an index from 0 to 0"),
        (asks({"class": "cat"}, {"class": "dog", "position": ["left of", -1]}), "clause -1"),
        (asks({"class": "cat"}, {"class": "dog", "position": ["under", 0]}), "relation='under'; write one of left of"),
        (asks({"class": "cat"}, {"class": "dog", "position": "left of"}), "write \\[relation, index\\]"),
        (asks({"class": "unicorn"}), "class='unicorn' is unknown to the detector; write one of cat, dog"),
        (asks({"class": "cat", "color": "teal"}), "color='teal'; write one of red, blue"),
    ],
)
def test_bad_metadata_is_named(metadata, message):
    with pytest.raises(ValueError, match=message):
        validate_metadata(metadata, classes=("cat", "dog"), colors=("red", "blue"))
