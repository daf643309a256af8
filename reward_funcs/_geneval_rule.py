"""GenEval's decision rule: detected objects and a prompt's metadata in, a verdict out. No model in here.

Two published rules read the same kept boxes:

    correct   geneval, evaluation/evaluate_images.py::evaluate: extra objects are allowed, `exclude` clauses count.
    strict,   reward-server, gen_eval.py::evaluate_reward: exact counts, partial credit as the mean of the clause
    score     terms, `exclude` clauses ignored.

Numbers are compared in float32, as the detector gives them: float32(0.3) is not above a threshold of 0.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from reward_funcs._geneval_metadata import validate_metadata

Detection = Mapping[str, Any]
Kept = dict[str, list[Detection]]

NO_OFFSET = 1e-3  # pixels; geneval relative_position: a smaller revised offset is no relation
RELATION_MARGIN = 0.5  # geneval relative_position: revised offset over distance must exceed this


@dataclass(frozen=True)
class Rule:
    """Numbers of the rule; the defaults are those of geneval's evaluate_images.py (`--options`)."""

    threshold: float = 0.3
    counting_threshold: float = 0.9  # replaces `threshold` when the tag is "counting"
    max_objects: int = 16  # boxes a class, most confident first
    max_overlap: float = 1.0  # boxes overlapping more are suppressed; exactly 1 switches suppression off
    position_threshold: float = 0.1  # share of the summed sizes within which an offset does not count


@dataclass(frozen=True)
class Verdict:
    """One image judged.

    correct: the benchmark's rule. strict: exact counts everywhere. score: the reward server's partial credit, may be
    negative. kept: class -> [x1, y1, x2, y2, score], most confident first. score_fixed: `score` with a missed
    position scored 0 instead of 0 and 1, and the result never below 0.
    """

    correct: bool
    strict: bool
    score: float
    kept: dict[str, list[list[float]]]
    score_fixed: float


def judge(detections: Sequence[Detection], metadata: str | Mapping[str, Any], **options: float) -> Verdict:
    """Judge one image. detections: {"class", "box" (x1, y1, x2, y2), "score", "color"}; options: fields of Rule.

    "color" is read only for the boxes a colour clause looks at, and may be absent elsewhere.
    """
    rule = rule_from_options(options)
    metadata = validate_metadata(metadata)
    kept = keep_boxes(detections, threshold_for(metadata, rule), rule.max_objects, rule.max_overlap)
    include = metadata.get("include", [])
    strict, score = server_score(kept, include, rule.position_threshold, released_position_terms)
    _, fixed = server_score(kept, include, rule.position_threshold, fixed_position_terms)
    return Verdict(
        correct=benchmark_correct(kept, metadata, rule.position_threshold),
        strict=strict,
        score=score,
        kept={
            name: [[*as_float32(d["box"]), *as_float32([d["score"]])] for d in boxes] for name, boxes in kept.items()
        },
        score_fixed=max(fixed, 0.0),
    )


def rule_from_options(options: Mapping[str, Any]) -> Rule:
    """Rule with the named numbers replaced; a ValueError names an option that does not exist."""
    known = [field.name for field in fields(Rule)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"unknown GenEval option {unknown[0]!r}; write one of {', '.join(known)}")
    return Rule(**options)


def as_float32(numbers: Sequence[float]) -> list[float]:
    """The numbers rounded to float32, as Python floats."""
    return np.asarray(numbers, dtype=np.float32).tolist()


# Which boxes count as objects


def threshold_for(metadata: Mapping[str, Any], rule: Rule) -> float:
    """Confidence a box must exceed: counting prompts ask for more."""
    return rule.counting_threshold if metadata["tag"] == "counting" else rule.threshold


def keep_boxes(
    detections: Sequence[Detection], threshold: float, max_objects: int = 16, max_overlap: float = 1.0
) -> Kept:
    """Detections that count, by class, most confident first: above the threshold, capped, then suppressed."""
    by_class: dict[str, list[Detection]] = {}
    for detection in detections:
        by_class.setdefault(detection["class"], []).append(detection)
    kept = {}
    for name, boxes in by_class.items():
        scores = np.asarray([box["score"] for box in boxes], dtype=np.float32)
        ranked = np.argsort(scores)[::-1]
        ranked = ranked[above(scores[ranked], threshold)][: int(max_objects)]
        if len(ranked):
            kept[name] = suppress([boxes[i] for i in ranked], max_overlap)
    return kept


def above(scores: np.ndarray, threshold: float) -> np.ndarray:
    """True where a float32 score is strictly above the threshold, the threshold rounded to float32 too."""
    return scores > np.float32(threshold)


def suppress(ranked: Sequence[Detection], max_overlap: float) -> list[Detection]:
    """Greedy suppression: a box stays if it overlaps every box kept before it by less than `max_overlap`."""
    if max_overlap == 1:
        return list(ranked)
    kept: list[Detection] = []
    for detection in ranked:
        if all(overlap(detection["box"], other["box"]) < np.float32(max_overlap) for other in kept):
            kept.append(detection)
    return kept


def overlap(box: Sequence[float], other: Sequence[float]) -> np.float32:
    """Intersection over union where a side is last - first + 1 pixels long."""
    first, second = np.asarray(box, dtype=np.float32), np.asarray(other, dtype=np.float32)
    shared = pixels(np.concatenate([np.maximum(first[:2], second[:2]), np.minimum(first[2:], second[2:])]))
    union = pixels(first) + pixels(second) - shared
    return np.float32(shared / union) if union else np.float32(0)


def pixels(box: np.ndarray) -> np.float32:
    """Area of a box, both of its border pixels included."""
    return np.prod(np.maximum(box[2:] - box[:2] + 1, 0))


# Where boxes lie


def relative_position(box: Sequence[float], other: Sequence[float], position_threshold: float = 0.1) -> set[str]:
    """Relations of `box` to `other`; none, one or two hold.

    The centre offset first shrinks, on each axis, by the threshold times the summed sizes. It is then divided by the
    length of the offset BEFORE shrinking, so it is shorter than a unit vector: two boxes of 100 pixels on one axis
    are related beyond 40 pixels (40 - 20 = 0.5 * 40), not beyond 20.
    """
    low = np.asarray([box[:2], other[:2]], dtype=np.float32)
    high = np.asarray([box[2:4], other[2:4]], dtype=np.float32)
    centers, sizes = (low + high) / 2, np.abs(high - low)
    offset = centers[0] - centers[1]
    shrunk = np.maximum(np.abs(offset) - position_threshold * sizes.sum(axis=0), 0) * np.sign(offset)
    if np.all(np.abs(shrunk) < NO_OFFSET):
        return set()
    return relations_of(shrunk / np.linalg.norm(offset))


def relations_of(direction: np.ndarray) -> set[str]:
    """Relations whose axis carries more than RELATION_MARGIN of the direction; y grows downwards."""
    x, y = direction
    margins = {"left of": -x, "right of": x, "above": -y, "below": y}
    return {relation for relation, margin in margins.items() if margin > RELATION_MARGIN}


def every_pair(
    relation: str, found: Sequence[Detection], targets: Sequence[Detection], position_threshold: float
) -> bool:
    """Whether each found box stands in the relation to each target box."""
    return all(
        relation in relative_position(box["box"], target["box"], position_threshold)
        for box in found
        for target in targets
    )


# The benchmark's rule


def benchmark_correct(kept: Kept, metadata: Mapping[str, Any], position_threshold: float) -> bool:
    """All `include` clauses hold and no `exclude` clause is exceeded."""
    groups: list[list[Detection] | None] = []  # boxes of each clause, None where it failed
    for clause in metadata.get("include", []):
        found = looked_at(kept.get(clause["class"], []), clause["count"])
        groups.append(found if clause_holds(clause, found, groups, position_threshold) else None)
    return None not in groups and not exceeded(kept, metadata.get("exclude", []))


def looked_at(boxes: Sequence[Detection], count: int) -> list[Detection]:
    """The boxes a clause looks at: the `count` most confident. A right colour further down does not help."""
    return list(boxes[:count])


def clause_holds(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    groups: Sequence[list[Detection] | None],
    position_threshold: float,
) -> bool:
    """One `include` clause of the benchmark's rule; extra objects are allowed."""
    if len(found) < clause["count"]:
        return False
    if "color" in clause and count_color(found, clause["color"]) < clause["count"]:
        return False
    if "position" not in clause:
        return True
    relation, index = clause["position"]
    targets = groups[index]
    return targets is not None and every_pair(relation, found, targets, position_threshold)


def exceeded(kept: Kept, exclude: Sequence[Mapping[str, Any]]) -> bool:
    """Whether some class appears at least as often as an `exclude` clause forbids, over all kept boxes."""
    return any(len(kept.get(clause["class"], [])) >= clause["count"] for clause in exclude)


def count_color(found: Sequence[Detection], color: str) -> int:
    """How many boxes have the colour."""
    for box in found:
        if "color" not in box:
            raise ValueError(
                f"a colour clause looks at a {box['class']!r} detection without a colour: "
                f"give every detection of that class a 'color' key, e.g. {color!r}"
            )
    return sum(box["color"] == color for box in found)


# The reward server's rule


def server_score(
    kept: Kept,
    include: Sequence[Mapping[str, Any]],
    position_threshold: float,
    position_terms: Callable[[bool], list[float]],
) -> tuple[bool, float]:
    """Whether every clause holds exactly, and the mean of the clause terms (0 without a clause)."""
    groups: list[list[Detection] | None] = []
    terms: list[float] = []
    for clause in include:
        found = kept.get(clause["class"], [])
        holds, clause_terms = server_clause(clause, found, groups, position_threshold, position_terms)
        groups.append(found if holds else None)
        terms.extend(clause_terms)
    return None not in groups, sum(terms) / len(terms) if terms else 0.0


def server_clause(
    clause: Mapping[str, Any],
    found: Sequence[Detection],
    groups: Sequence[list[Detection] | None],
    position_threshold: float,
    position_terms: Callable[[bool], list[float]],
) -> tuple[bool, list[float]]:
    """One clause: whether it holds exactly, and its terms: count, then colour, then position if still holding."""
    count = clause["count"]
    terms = [closeness(len(found), count)]
    if len(found) != count:
        # One zero, also when the clause asks for a colour and a position.
        return False, terms + ([0.0] if "color" in clause or "position" in clause else [])
    holds = True
    if "color" in clause:
        right = count_color(found, clause["color"])
        terms.append(closeness(right, count))
        holds = right == count
    if "position" in clause and holds:
        relation, index = clause["position"]
        targets = groups[index]
        if targets is None:
            return False, [*terms, 0.0]
        holds = every_pair(relation, found, targets, position_threshold)
        terms.extend(position_terms(holds))
    return holds, terms


def closeness(found: int, count: int) -> float:
    """1 when the count is met, falling by 1 / count an object off; below 0 from 2 * count + 1 objects on."""
    return 1 - abs(count - found) / count


def released_position_terms(holds: bool) -> list[float]:
    """Terms of a position as released (gen_eval.py:258): a miss adds 0 and THEN the 1 of a hit, so it scores half."""
    return [1.0] if holds else [0.0, 1.0]


def fixed_position_terms(holds: bool) -> list[float]:
    """Terms of a position as meant: a miss adds 0 only."""
    return [1.0] if holds else [0.0]
