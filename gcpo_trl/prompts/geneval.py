"""GenEval's 553 prompts, redrawn bit for bit, and training prompts in the same grammar that are none of them.

    official   prompts/create_prompts.py: 80 single objects and 100 draws of each other tag from numpy's
               default_rng(43), repeats dropped
    training   the same draws from another seed, in the proportions of Flow-GRPO's dataset/merge_genevaltask.py,
               without those that ask for the picture of an official prompt

Two prompts ask for the same picture if their canonical keys are equal: the order of clauses does not count, and "a dog
left of a cat" is "a cat right of a dog". Flow-GRPO's filter compares the words of the prompts instead.

The grammar is naive on purpose ("benchs", "knifes"): it is the benchmark's. A person never gets a colour.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward_funcs.geneval import CLASSES, COLORS, RELATIONS, TAGS, validate_metadata

SEED = 43  # create_prompts.py, default of --seed
DRAWS = 100  # same, default of --num-prompts
SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"  # of prompts/evaluation_metadata.jsonl
# merge_genevaltask.py: weights .7 .5 .3 .1 .1 and no single objects, 50,000 rows.
WEIGHTS = {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0}
ROWS = 50_000

NUMBERS = {2: "two", 3: "three", 4: "four"}
COLORED = tuple(name for name in CLASSES if name != "person")
# Relations that are said from the other object instead.
INVERSE = {"right of": "left of", "below": "above"}


# drawing


def an(words: str) -> str:
    """With the article that the first letter asks for."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def plural(name: str) -> str:
    """With "es" after an s, else "s"."""
    return f"{name}{'es' if name.endswith('s') else 's'}"


def clause(name: str, count: int = 1, **attributes: Any) -> dict[str, Any]:
    """What is asked of the objects of one class; the order of keys is that of the official file."""
    return {"class": name, "count": count, **attributes}


def single_object(name: str) -> dict[str, Any]:
    """Metadata of "a photo of a bench"."""
    return {"tag": "single_object", "include": [clause(name)], "prompt": f"a photo of {an(name)}"}


def two_of(pool: tuple[str, ...], rng: np.random.Generator) -> tuple[str, str]:
    """Two different entries, in the order drawn."""
    first, second = rng.choice(len(pool), size=2, replace=False)
    return pool[first], pool[second]


def one_of(pool: tuple[str, ...], rng: np.random.Generator) -> str:
    """One entry."""
    return pool[rng.choice(len(pool))]


def draw_single_object(rng: np.random.Generator) -> dict[str, Any]:
    """One of 80."""
    return single_object(one_of(CLASSES, rng))


def draw_two_object(rng: np.random.Generator) -> dict[str, Any]:
    """One of 80 x 79, in either order."""
    a, b = two_of(CLASSES, rng)
    return {"tag": "two_object", "include": [clause(a), clause(b)], "prompt": f"a photo of {an(a)} and {an(b)}"}


def draw_counting(rng: np.random.Generator) -> dict[str, Any]:
    """One of 80 x 3."""
    name = one_of(CLASSES, rng)
    count = int(rng.integers(min(NUMBERS), max(NUMBERS), endpoint=True))
    return {
        "tag": "counting",
        "include": [clause(name, count)],
        "exclude": [clause(name, count + 1)],
        "prompt": f"a photo of {NUMBERS[count]} {plural(name)}",
    }


def draw_colors(rng: np.random.Generator) -> dict[str, Any]:
    """One of 79 x 10."""
    name, color = one_of(COLORED, rng), one_of(COLORS, rng)
    return {"tag": "colors", "include": [clause(name, color=color)], "prompt": f"a photo of {an(color)} {name}"}


def draw_position(rng: np.random.Generator) -> dict[str, Any]:
    """One of 80 x 79 x 4. The object referred to is the first clause, the one that is placed the second."""
    moved, reference = two_of(CLASSES, rng)
    relation = one_of(RELATIONS, rng)
    return {
        "tag": "position",
        "include": [clause(reference), clause(moved, position=[relation, 0])],
        "prompt": f"a photo of {an(moved)} {relation} {an(reference)}",
    }


def draw_color_attr(rng: np.random.Generator) -> dict[str, Any]:
    """One of 79 x 78 x 10 x 9, in either order. The colours differ."""
    (a, b), (color, other) = two_of(COLORED, rng), two_of(COLORS, rng)
    return {
        "tag": "color_attr",
        "include": [clause(a, color=color), clause(b, color=other)],
        "prompt": f"a photo of {an(color)} {a} and {an(other)} {b}",
    }


# In the order of the official file.
DRAW: dict[str, Callable[[np.random.Generator], dict[str, Any]]] = {
    "single_object": draw_single_object,
    "two_object": draw_two_object,
    "counting": draw_counting,
    "colors": draw_colors,
    "position": draw_position,
    "color_attr": draw_color_attr,
}
PAIRS = math.comb(len(CLASSES), 2)
# Canonical keys that each tag can draw.
POSSIBLE = {
    "single_object": len(CLASSES),
    "two_object": PAIRS,
    "counting": len(CLASSES) * len(NUMBERS),
    "colors": len(COLORED) * len(COLORS),
    "position": PAIRS * len(RELATIONS),  # two orders of the pair, and half of the relations
    "color_attr": math.comb(len(COLORED), 2) * math.perm(len(COLORS), 2),
}


# the benchmark


@functools.cache
def official_text() -> str:
    """The official evaluation_metadata.jsonl; raises RuntimeError where numpy's draws are no longer those of 2.4."""
    rng = np.random.default_rng(SEED)
    drawn = [single_object(CLASSES[i]) for i in rng.choice(len(CLASSES), size=len(CLASSES), replace=False)]
    drawn += [draw(rng) for tag, draw in DRAW.items() if tag != "single_object" for _ in range(DRAWS)]
    text = "".join(f"{line}\n" for line in dict.fromkeys(map(json.dumps, drawn)))
    digest = hashlib.sha256(text.encode()).hexdigest()
    if digest != SHA256:
        raise RuntimeError(
            f"numpy {np.__version__} draws other prompts than GenEval's (sha256 {digest[:12]}, not {SHA256[:12]}); "
            "install the numpy of constraints.txt"
        )
    return text


def official() -> list[dict[str, Any]]:
    """Metadata of the 553 prompts, in the order of the official file."""
    return [json.loads(line) for line in official_text().splitlines()]


def row(metadata: Mapping[str, Any]) -> dict[str, str]:
    """A row of a dataset: the prompt, and the metadata as the JSON string that the reward reads."""
    return {"prompt": metadata["prompt"], "metadata": json.dumps(metadata)}


def canonical_key(metadata: str | Mapping[str, Any]) -> Hashable:
    """Equal for two prompts that ask for the same picture, whatever their words and their tag.

    metadata: GenEval's, as a dictionary or its JSON string; raises ValueError if it breaks the schema.
    """
    checked = validate_metadata(metadata)
    include = checked.get("include", [])
    items = [(asked["class"], asked["count"], asked.get("color", "")) for asked in include]
    relations = []
    for moved, asked in zip(items, include, strict=True):
        if "position" in asked:
            relation, index = asked["position"]
            placed = (relation, moved, items[index])
            relations.append((INVERSE[relation], items[index], moved) if relation in INVERSE else placed)
    exclude = [(asked["class"], asked["count"]) for asked in checked.get("exclude", [])]
    return tuple(sorted(items)), tuple(sorted(relations)), tuple(sorted(exclude))


@functools.cache
def official_keys() -> dict[Hashable, str]:
    """Canonical key -> tag of the 553 prompts."""
    return {canonical_key(metadata): metadata["tag"] for metadata in official()}


@functools.cache
def official_prompts() -> frozenset[str]:
    """The 553 prompts as words."""
    return frozenset(metadata["prompt"] for metadata in official())


# training


@dataclass(frozen=True)
class Counts:
    """What became of the draws of one tag: drawn = same_words + other_words + repeated + kept.

    same_words, other_words: dropped, since the picture is that of an official prompt, in its words or in others.
    repeated: dropped because its key was kept before; only with `unique`. distinct: keys among those kept.
    """

    drawn: int = 0
    same_words: int = 0
    other_words: int = 0
    repeated: int = 0
    kept: int = 0
    distinct: int = 0


@dataclass(frozen=True)
class Generated:
    """Rows for a trainer, shuffled, and the counts of each tag."""

    rows: list[dict[str, str]]
    counts: dict[str, Counts]


def generate(
    n: int = ROWS, seed: int = 0, weights: Mapping[str, float] | None = None, unique: bool = False
) -> Generated:
    """`n` rows without the picture of any official prompt, each tag in proportion to its weight.

    A draw that is dropped is drawn again, so the weights hold after the filter, as in Flow-GRPO, which filters its
    pools and then samples them to fixed shares. Rows repeat, as there: only 160 counting prompts are not the
    benchmark's. Each tag draws from its own stream.
    weights: by tag, those left out are 0; None is the published ones. unique: no key twice. Raises ValueError where a
    tag has fewer keys than the rows need.
    """
    if seed < 0:
        raise ValueError(f"seed={seed}; give a whole number of at least 0")
    quotas = shares(n, WEIGHTS if weights is None else weights)
    check_room(quotas, unique)
    drawn: list[dict[str, Any]] = []
    counts = {}
    for index, tag in enumerate(TAGS):
        kept, counts[tag] = draw_tag(tag, quotas[tag], np.random.default_rng([seed, index]), unique)
        drawn += kept
    order = np.random.default_rng([seed, len(TAGS)]).permutation(n)
    return Generated([row(drawn[i]) for i in order], counts)


def draw_tag(tag: str, quota: int, rng: np.random.Generator, unique: bool) -> tuple[list[dict[str, Any]], Counts]:
    """`quota` metadata of one tag that pass the filter, and what was dropped on the way."""
    tally: Counter[str] = Counter()
    kept: list[dict[str, Any]] = []
    seen: set[Hashable] = set()
    while len(kept) < quota:
        metadata = DRAW[tag](rng)
        key = canonical_key(metadata)
        if key in official_keys():
            tally["same_words" if metadata["prompt"] in official_prompts() else "other_words"] += 1
        elif unique and key in seen:
            tally["repeated"] += 1
        else:
            seen.add(key)
            kept.append(metadata)
    return kept, Counts(drawn=tally.total() + quota, kept=quota, distinct=len(seen), **tally)


def shares(n: int, weights: Mapping[str, float]) -> dict[str, int]:
    """`n` rows divided by weight over the tags, in whole numbers; what is left goes to the largest fractions."""
    if n < 1:
        raise ValueError(f"n={n} rows; ask for at least 1")
    for tag, weight in weights.items():
        if tag not in TAGS:
            raise ValueError(f"weight of an unknown tag {tag!r}; write {', '.join(TAGS)}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"weight {tag}={weight}; write a finite number of at least 0")
    total = sum(weights.values())
    if total == 0:
        raise ValueError("all weights are 0; give at least one tag a positive weight")
    exact = {tag: n * weights.get(tag, 0) / total for tag in TAGS}
    quotas = {tag: math.floor(share) for tag, share in exact.items()}
    for tag in sorted(TAGS, key=lambda tag: quotas[tag] - exact[tag])[: n - sum(quotas.values())]:
        quotas[tag] += 1
    return quotas


def check_room(quotas: Mapping[str, int], unique: bool) -> None:
    """Every tag has a key to draw that the benchmark has not, and with `unique` as many as rows."""
    taken = Counter(official_keys().values())
    for tag, quota in quotas.items():
        free = POSSIBLE[tag] - taken[tag]
        if quota and not free:
            raise ValueError(f"all {POSSIBLE[tag]} prompts of {tag} are the benchmark's; give it the weight 0")
        if unique and quota > free:
            raise ValueError(
                f"{quota} rows of {tag}, but only {free} of its prompts are not the benchmark's; lower n or its "
                "weight, or leave out unique"
            )
