"""Captions of the shapes world: GenEval's six task styles over shapes and colours, with GenEval-shaped metadata.

A *spec* is what a caption says: its task tag, the objects it names and the relation between them. The caption, the
metadata that the judge reads and the canonical key that tells two prompts apart are functions of the spec. Held-out
prompts are chosen by canonical key, so "a circle left of a ring" is never trained on under the name "a ring right of a
circle". GenEval's grammar is naive on purpose (``a``/``an`` by the first letter, ``es`` only after ``s``).
"""

from __future__ import annotations

import itertools
import json
import random
from dataclasses import dataclass, field

SHAPES = (
    "circle",
    "square",
    "triangle",
    "diamond",
    "cross",
    "ring",
    "frame",
    "bar",
    "pillar",
    "crescent",
    "heart",
    "hourglass",
)
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black", "white")
TASKS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")
# A relation and the one that says the same with the objects exchanged.
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}

HELD_OUT_A_TASK = 40
HELD_OUT_SINGLES = 6  # only twelve single-object prompts exist
SPLIT_SEED = 43  # GenEval's own prompt seed


@dataclass(frozen=True)
class Item:
    """Objects of one clause: ``count`` shapes, of a given colour or of any."""

    shape: str
    color: str | None = None
    count: int = 1

    def phrase(self) -> str:
        words = f"{self.color} {self.shape}" if self.color else self.shape
        if self.count > 1:
            return f"{NUMBERS[self.count]} {words}{'es' if words.endswith('s') else 's'}"
        return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


@dataclass(frozen=True)
class Spec:
    """What a caption says. ``relation`` reads: the SECOND item stands in this relation to the first (as in GenEval)."""

    tag: str
    items: tuple[Item, ...] = field(default_factory=tuple)
    relation: str | None = None

    @property
    def prompt(self) -> str:
        if self.relation:
            reference, moved = self.items
            return f"a photo of {moved.phrase()} {self.relation} {reference.phrase()}"
        return "a photo of " + " and ".join(item.phrase() for item in self.items)

    @property
    def metadata(self) -> dict:
        """GenEval's schema: ``tag``, ``include`` clauses, ``exclude`` for counting, ``prompt``."""
        include: list[dict] = []
        for item in self.items:
            clause: dict = {"class": item.shape, "count": item.count}
            if item.color:
                clause["color"] = item.color
            include.append(clause)
        if self.relation:
            include[1]["position"] = [self.relation, 0]
        metadata: dict = {"tag": self.tag, "include": include}
        if self.tag == "counting":
            metadata["exclude"] = [{"class": item.shape, "count": item.count + 1} for item in self.items]
        return metadata | {"prompt": self.prompt}

    @property
    def key(self) -> tuple:
        """Equal for two prompts that ask for the same picture: clause order and inverted relations do not count."""
        items = [(item.shape, item.color or "", item.count) for item in self.items]
        if self.relation is None:
            return (self.tag, tuple(sorted(items)))
        if self.relation in ("left of", "above"):
            return (self.tag, self.relation, (items[1], items[0]))
        return (self.tag, INVERSE[self.relation], (items[0], items[1]))

    def record(self) -> dict[str, str]:
        """A dataset row: ``prompt``, ``metadata`` (JSON, since Arrow cannot hold differing nested fields), ``tag``."""
        return {"prompt": self.prompt, "metadata": json.dumps(self.metadata), "tag": self.tag}


def all_specs(tag: str) -> list[Spec]:
    """Every spec of one task, in a fixed order, both readings of a relation included."""
    pairs = list(itertools.permutations(SHAPES, 2))
    match tag:
        case "single_object":
            return [Spec(tag, (Item(shape),)) for shape in SHAPES]
        case "two_object":
            return [Spec(tag, (Item(a), Item(b))) for a, b in pairs]
        case "counting":
            colors = (None, *COLORS)
            return [Spec(tag, (Item(s, c, n),)) for s, c, n in itertools.product(SHAPES, colors, NUMBERS)]
        case "colors":
            return [Spec(tag, (Item(shape, color),)) for shape, color in itertools.product(SHAPES, COLORS)]
        case "position":
            return [Spec(tag, (Item(a), Item(b)), relation) for (a, b), relation in itertools.product(pairs, RELATIONS)]
        case "color_attr":
            hues = list(itertools.permutations(COLORS, 2))
            return [Spec(tag, (Item(a, c), Item(b, d))) for (a, b), (c, d) in itertools.product(pairs, hues)]
    raise ValueError(f"unknown task {tag!r}; the shapes world has {', '.join(TASKS)}")


def held_out_keys(tag: str) -> frozenset[tuple]:
    """Canonical keys kept out of pretraining and of reinforcement learning, the same on every machine."""
    keys = sorted({spec.key for spec in all_specs(tag)})
    random.Random(f"{SPLIT_SEED}-{tag}").shuffle(keys)
    return frozenset(keys[: HELD_OUT_SINGLES if tag == "single_object" else HELD_OUT_A_TASK])


def split_specs(tag: str) -> tuple[list[Spec], list[Spec]]:
    """``(train, held_out)`` specs of one task; no canonical key is in both, and held-out keys appear once each."""
    held_out = held_out_keys(tag)
    train, test, taken = [], [], set()
    for spec in all_specs(tag):
        if spec.key not in held_out:
            train.append(spec)
        elif spec.key not in taken:
            taken.add(spec.key)
            test.append(spec)
    return train, test


def sample_specs(count: int, seed: int, tasks: tuple[str, ...] = TASKS) -> list[Spec]:
    """``count`` training specs, tasks in turn, drawn with repetition and shuffled by ``seed``."""
    generator = random.Random(seed)
    pools = {tag: split_specs(tag)[0] for tag in tasks}
    specs = [generator.choice(pools[tasks[i % len(tasks)]]) for i in range(count)]
    generator.shuffle(specs)
    return specs


def held_out_specs() -> list[Spec]:
    """The evaluation set: every held-out key of every task, in a fixed order."""
    return [spec for tag in TASKS for spec in split_specs(tag)[1]]
