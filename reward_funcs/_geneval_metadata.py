"""GenEval's prompt metadata (prompts/evaluation_metadata.jsonl), checked before an image is judged by it.

    {"tag": str, "include": [{"class": str, "count": int, "color"?: str, "position"?: [relation, index]}, ...],
     "exclude"?: [{"class": str, "count": int}, ...], "prompt"?: str}

Unchecked, a count of 0 divides by zero, a position index pointing forward is an IndexError, and one pointing back from
the end (-1) is silently another object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")


def validate_metadata(
    metadata: str | Mapping[str, Any], classes: Sequence[str] | None = None, colors: Sequence[str] | None = None
) -> dict[str, Any]:
    """Metadata as a dictionary, checked; a ValueError says what was seen and what to write.

    metadata: a dictionary or its JSON string. classes, colors: the words the detector and the colour classifier know;
    None leaves them unchecked.
    """
    checked = json.loads(metadata) if isinstance(metadata, str) else metadata
    if not isinstance(checked, Mapping):
        raise ValueError(f"GenEval metadata is a {type(checked).__name__}; write one JSON object per image")
    check_keys(checked, "metadata", required={"tag"}, optional={"include", "exclude", "prompt"})
    if checked["tag"] not in TAGS:
        raise ValueError(f"metadata tag={checked['tag']!r}; write one of {', '.join(TAGS)}")
    if "include" not in checked and "exclude" not in checked:
        raise ValueError(
            "metadata has neither 'include' nor 'exclude', so there is nothing to judge; add a clause list"
        )
    for index, clause in enumerate(checked.get("include", [])):
        check_clause(clause, f"include[{index}]", classes, optional={"color", "position"})
        check_color(clause, f"include[{index}]", colors)
        check_position(clause, index)
    for index, clause in enumerate(checked.get("exclude", [])):
        check_clause(clause, f"exclude[{index}]", classes, optional=set())
    return dict(checked)


def check_keys(mapping: Mapping[str, Any], where: str, required: set[str], optional: set[str]) -> None:
    """Every required key is there and no unknown one."""
    missing, unknown = sorted(required - set(mapping)), sorted(set(mapping) - required - optional)
    if missing:
        raise ValueError(f"{where} has no {missing[0]!r}; it has {sorted(mapping)}")
    if unknown:
        raise ValueError(f"{where} has the unknown key {unknown[0]!r}; write only {sorted(required | optional)}")


def check_clause(clause: Any, where: str, classes: Sequence[str] | None, optional: set[str]) -> None:
    """A clause names a class and a count of at least 1."""
    if not isinstance(clause, Mapping):
        raise ValueError(f'{where} is {clause!r}; write an object such as {{"class": "dog", "count": 1}}')
    check_keys(clause, where, required={"class", "count"}, optional=optional)
    count = clause["count"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ValueError(f"{where} count={count!r}; write a whole number of at least 1")
    if classes is not None and clause["class"] not in classes:
        raise ValueError(
            f"{where} class={clause['class']!r} is unknown to the detector; write one of {', '.join(classes)}"
        )


def check_color(clause: Mapping[str, Any], where: str, colors: Sequence[str] | None) -> None:
    """A colour, if asked for, is one the classifier can answer."""
    if colors is not None and "color" in clause and clause["color"] not in colors:
        raise ValueError(f"{where} color={clause['color']!r}; write one of {', '.join(colors)}")


def check_position(clause: Mapping[str, Any], index: int) -> None:
    """A position, if asked for, is a known relation to an earlier clause."""
    if "position" not in clause:
        return
    position = clause["position"]
    if not isinstance(position, Sequence) or isinstance(position, str) or len(position) != 2:
        raise ValueError(f'include[{index}] position={position!r}; write [relation, index], e.g. ["left of", 0]')
    relation, target = position
    if relation not in RELATIONS:
        raise ValueError(f"include[{index}] position relation={relation!r}; write one of {', '.join(RELATIONS)}")
    if not isinstance(target, int) or isinstance(target, bool) or not 0 <= target < index:
        allowed = f"an index from 0 to {index - 1}" if index else "the clause after the one it refers to"
        raise ValueError(f"include[{index}] position refers to clause {target!r}; write {allowed}")
