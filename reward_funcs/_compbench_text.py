"""What a T2I-CompBench prompt asks for: noun phrases, a relation of two objects, counts. No model, no spaCy.

T2I-CompBench reads its prompts with spaCy's en_core_web_sm, which spaCy does not publish as a package. Two things stand
in for it. A dataset column `compbench`, one JSON string a row, says it all and is believed:

    {"phrases": ["a red car", "a white sheep"], "relation": ["car", "on the left of", "sheep"],
     "counts": {"car": 2}, "kind": "spatial", "clip_text": "a car and a sheep"}        every key optional

What the column leaves out comes from the prompt by the rules below: a noun phrase begins at a determiner, a number or a
boundary word and ends before the next one or before a verb. Against spaCy this drops pronouns and the place words of a
relation ("the bottom" of "on the bottom of", which the released code asks as a question), and on free sentences some
phrases are cut elsewhere; reward_funcs/README.md says how often. With `pip install spacy` and its model,
COMPBENCH_SPACY=en_core_web_sm takes the phrases and the adjectives from spaCy as the released code does.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from reward_funcs._compbench_words import (
    ARTICLES,
    ATTRIBUTES,
    BOUNDARIES,
    DETERMINERS,
    IRREGULAR_PLURALS,
    NOUNS_LIKE_VERBS,
    NUMBERS,
    OBJECT_ATTRIBUTES,
    OBJECTS,
    PUBLISHED_RELATIONS,
    RELATIONS,
    VERBS,
)

KINDS = ("spatial", "action", "spatial_action")  # the benchmark's complex_*_{spatial,action,spatialaction}.txt
SPACY_VARIABLE = "COMPBENCH_SPACY"
NOT_ASKED = frozenset(("top", "the side", "the left", "the right"))  # BLIPvqa_eval/BLIP_vqa.py, noun chunks left out
TOKEN = re.compile(r"[A-Za-z][A-Za-z'-]*|\d+|[^\sA-Za-z\d]")
PLACE = re.compile(r"\b(?:" + "|".join(sorted(RELATIONS, key=len, reverse=True)) + r")\b", re.IGNORECASE)


@dataclass(frozen=True)
class Relation:
    """`first` stands `words` (a key of RELATIONS) `second`; nouns in the singular, without adjectives."""

    first: str
    words: str
    second: str


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for. phrases: with articles and adjectives; counts: singular noun -> number."""

    phrases: tuple[str, ...]
    relation: Relation | None
    counts: dict[str, int]
    kind: str
    clip_text: str


def read_prompt(prompt: str, column: str | None = None) -> Asked:
    """What the prompt asks for; keys of the `compbench` column take precedence over its text."""
    said = {} if column is None else checked_column(column)
    relation = Relation(*said["relation"]) if said.get("relation") else find_relation(prompt)
    return Asked(
        phrases=tuple(said["phrases"]) if "phrases" in said else noun_phrases(prompt),
        relation=relation,
        counts=said["counts"] if "counts" in said else find_counts(prompt),
        kind=said["kind"] if "kind" in said else kind_of(prompt),
        clip_text=said["clip_text"] if "clip_text" in said else without_adjectives(prompt),
    )


def checked_column(column: str) -> dict[str, Any]:
    """The `compbench` column, parsed and checked before any model loads."""
    try:
        said = json.loads(column)
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"compbench={column!r} is not a JSON string; write json.dumps of a dictionary") from error
    known = {"phrases", "relation", "counts", "kind", "clip_text"}
    if not isinstance(said, dict) or not said.keys() <= known:
        raise ValueError(f"compbench={column!r}; write a dictionary with keys among {', '.join(sorted(known))}")
    for key in ("phrases", "relation"):
        if key in said and not (isinstance(said[key], list) and all(isinstance(word, str) for word in said[key])):
            raise ValueError(f"compbench {key}={said[key]!r}; write a list of strings")
    if said.get("relation") and (len(said["relation"]) != 3 or said["relation"][1] not in RELATIONS):
        raise ValueError(
            f"compbench relation={said['relation']!r}; write [noun, words, noun], words one of {', '.join(RELATIONS)}"
        )
    counts = said.get("counts", {})
    if not isinstance(counts, dict) or not all(type(number) is int and number >= 1 for number in counts.values()):
        raise ValueError(f"compbench counts={counts!r}; write {{noun: whole number of at least 1}}")
    if said.get("kind", "action") not in KINDS:
        raise ValueError(f"compbench kind={said['kind']!r}; write one of {', '.join(KINDS)}")
    if not isinstance(said.get("clip_text", ""), str):
        raise ValueError(f"compbench clip_text={said['clip_text']!r}; write a string")
    return said


def noun_phrases(text: str) -> tuple[str, ...]:
    """Noun phrases in order, as written: "a red car and a white sheep" -> ("a red car", "a white sheep")."""
    if os.environ.get(SPACY_VARIABLE):
        chunks = [chunk.text for chunk in spacy_doc(text).noun_chunks]
    else:
        *before, last = PLACE.split(text)
        chunks = [phrase for part in before for phrase in chunk(part, end="near")] + chunk(last)
    return tuple(phrase for phrase in chunks if phrase not in NOT_ASKED)


def chunk(text: str, end: str = ".") -> list[str]:
    """Noun phrases of a text without relation words; `end` is the word or mark behind it."""
    tokens = list(TOKEN.finditer(text))
    words = [token.group().lower() for token in tokens] + [end]
    phrases: list[str] = []
    start: int | None = None  # first token of the phrase being read
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else end
        if start is not None and not joins(words[start:index], word, following):
            if names_something(words[start:index]):
                phrases.append(text[tokens[start].start() : tokens[index - 1].end()])
            start = None
            if word not in DETERMINERS:  # a boundary, or the verb of the phrase: neither opens the next
                continue
        if start is None and word[0].isalnum() and word not in BOUNDARIES and not is_verb(word, following):
            start = index
    return phrases


def joins(inside: Sequence[str], word: str, following: str) -> bool:
    """Whether `word`, which `following` follows, goes on with the phrase `inside`."""
    named = names_something(inside)
    if word in (",", "and"):  # "the intricate, winding maze", "a black and white cat"
        adjectives = [other for other in inside if other not in DETERMINERS and other != ","]
        last = following in ATTRIBUTES if word == "and" else not closes(following)
        return bool(adjectives) and ATTRIBUTES.issuperset(adjectives) and last and (word == "and" or not named)
    if not word[0].isalnum() or word in BOUNDARIES or word in DETERMINERS:
        return False
    # An adjective in "-ed" stands before the noun: "two drums added rhythm", but "the striped rug".
    return not named or not (is_verb(word, following) or (word.endswith("ed") and word not in NOUNS_LIKE_VERBS))


def is_verb(word: str, following: str) -> bool:
    """Whether a word is a verb or an adverb rather than part of a noun phrase, judged by form and by what follows.

    No noun stands before "the" or "a": "the stand display the flowers". A word in "-ed" or "-ing" before a noun is an
    adjective: "the parked car", but "the car parked near the wall".
    """
    if word in NOUNS_LIKE_VERBS:
        return False
    if word in VERBS:
        return following not in (".", ",", "and", "of")  # "a book stand", "a display of fruit"
    participle = word.endswith(("ed", "ing")) and (closes(following) or following.endswith("ly"))
    return following in DETERMINERS or word.endswith("ly") or participle


def closes(word: str) -> bool:
    """Whether no noun phrase goes on at this word."""
    return word in DETERMINERS or word in BOUNDARIES or not word[0].isalnum()


def names_something(words: Sequence[str]) -> bool:
    """Whether a phrase has a word besides determiners and attributes, or ends in an attribute that can be a noun."""
    content = [word for word in words if word[0].isalnum() and word not in DETERMINERS and word != "and"]
    named = any(word not in ATTRIBUTES and not is_adverb(word) for word in content)
    return named or (bool(content) and content[-1] in OBJECT_ATTRIBUTES)


def is_adverb(word: str) -> bool:
    """Whether the word has an adverb's form."""
    return word.endswith("ly") and word not in NOUNS_LIKE_VERBS


def noun(phrase: str) -> str:
    """The object of a phrase: determiners and attributes stripped from its front, singular."""
    words = [token.group().lower() for token in TOKEN.finditer(phrase)]
    while len(words) > 1 and (words[0] in DETERMINERS or words[0] in ATTRIBUTES or words[0] in (",", "and")):
        words = words[1:]
    return " ".join([*words[:-1], singular(words[-1])])


def singular(word: str) -> str:
    """Singular of an English noun; words that are their own plural stay."""
    if word in OBJECTS or word in IRREGULAR_PLURALS:
        return IRREGULAR_PLURALS.get(word, word)
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "zes", "sses", "oes")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith(("ss", "us", "is")) else word


def find_relation(prompt: str) -> Relation | None:
    """The first relation with a noun phrase before and behind it; None where there is none.

    The released code takes the first and the last noun of a simple prompt, the nearest nouns of a complex one.
    """
    for place in PLACE.finditer(prompt):
        before, behind = chunk(prompt[: place.start()], end="near"), chunk(prompt[place.end() :])
        if before and behind:
            return Relation(noun(before[-1]), place.group().lower(), noun(behind[0]))
    return None


def find_counts(prompt: str) -> dict[str, int]:
    """Singular noun -> number. "a" counts one of the benchmark's OBJECTS only: "four men at a picnic" counts men."""
    counts: dict[str, int] = {}
    for phrase in chunk(prompt):
        first = TOKEN.match(phrase)
        number = NUMBERS.get(first.group().lower()) if first else None
        name = noun(phrase)
        if number is None and first is not None and first.group().lower() in ARTICLES and name in OBJECTS:
            number = 1
        if number is not None:
            counts[name] = number
    return counts


def kind_of(prompt: str) -> str:
    """Which scores 3-in-1 averages: "spatial" (a relation after "is" or "was"), "spatial_action" (after another verb),
    or "action" (no relation of the benchmark's). Agrees with its lists on 299 of the 300 complex_val prompts."""
    lowered = prompt.lower()
    place = next((words for words in PUBLISHED_RELATIONS if words in lowered), None)
    if place is None:
        return "action"
    return "spatial" if re.search(rf"\b(?:is|are|was|were) {place}", lowered) else "spatial_action"


def without_adjectives(prompt: str) -> str:
    """The text CLIP scores in the complex category: the prompt less its adjectives (CLIPScore_eval/CLIP_similarity.py).

    Without spaCy: less the attributes that stand before a noun.
    """
    if os.environ.get(SPACY_VARIABLE):
        return " ".join(token.text for token in spacy_doc(prompt) if token.pos_ != "ADJ")
    for phrase in noun_phrases(prompt):
        words = phrase.split()
        kept = [word for word in words[:-1] if word.strip(",").lower() not in ATTRIBUTES | {"and"}]
        prompt = prompt.replace(phrase, " ".join([*kept, words[-1]]), 1)
    return prompt


def spacy_doc(text: str) -> Any:
    """The text as COMPBENCH_SPACY's model reads it."""
    return load_spacy(os.environ[SPACY_VARIABLE])(text)


@functools.cache
def load_spacy(name: str) -> Any:
    """A spaCy model, loaded once a process."""
    try:
        import spacy

        return spacy.load(name)
    except (ImportError, OSError) as error:
        raise FileNotFoundError(
            f"{SPACY_VARIABLE}={name!r}: {error}. Run `pip install spacy` and `python -m spacy download {name}`, or "
            f"unset {SPACY_VARIABLE} to read the prompts by rule"
        ) from error
