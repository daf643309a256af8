"""What T2I-CompBench's prompts ask for, one example and more of every template of its files."""

import json

import pytest

from reward_funcs import _compbench_text as text
from reward_funcs._compbench_words import OBJECTS


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        # color, shape, texture: two phrases, with or without an article
        ("a green bench and a blue bowl", ["a green bench", "a blue bowl"]),
        ("a red apple and yellow bananas", ["a red apple", "yellow bananas"]),
        ("a stop sign and red white line", ["a stop sign", "red white line"]),
        ("a red chair and a green orange", ["a red chair", "a green orange"]),
        ("an oval picture frame and a square painting", ["an oval picture frame", "a square painting"]),
        ("a diamond ring and a pyramidal ring box", ["a diamond ring", "a pyramidal ring box"]),
        ("a pyramidal book stand and a cubic block", ["a pyramidal book stand", "a cubic block"]),
        ("a cubic book and a cylindrical can of soup", ["a cubic book", "a cylindrical can", "soup"]),
        ("wooden chopsticks and a glass cup", ["wooden chopsticks", "a glass cup"]),
        ("a bathroom with a black and white shower curtain", ["a bathroom", "a black and white shower curtain"]),
        ("Kitchen with a green wall, and red tile.", ["Kitchen", "a green wall", "red tile"]),
        (
            "The fluffy pillow and glass lampshade rest on the wooden nightstand by the metallic bed.",
            ["The fluffy pillow", "glass lampshade", "the wooden nightstand", "the metallic bed"],
        ),
        (
            "The glass vase and metallic stand display the wooden flowers on the fabric dresser.",
            ["The glass vase", "metallic stand", "the wooden flowers", "the fabric dresser"],
        ),
        # spatial: the place words are no object
        ("a girl on the top of a frog", ["a girl", "a frog"]),
        ("a mouse on side of a key", ["a mouse", "a key"]),
        # numeracy
        ("two desks, four fish and four trains", ["two desks", "four fish", "four trains"]),
        ("five sheep grazed in the pasture", ["five sheep", "the pasture"]),
        ("two drums added rhythm to the music", ["two drums", "rhythm", "the music"]),
        # complex
        ("The red hat was on top of the brown coat rack.", ["The red hat", "the brown coat rack"]),
        ("The black phone was resting on the brown charger.", ["The black phone", "the brown charger"]),
        ("The sleek cat sat next to the fluffy white pillow.", ["The sleek cat", "the fluffy white pillow"]),
        ("The shiny silver car zoomed past the old rusty truck.", ["The shiny silver car", "the old rusty truck"]),
        ("The butterfly fluttered near the fragrant flower.", ["The butterfly", "the fragrant flower"]),
        (
            "The smooth, polished surface of the marble statue reflected the warm light.",
            ["The smooth, polished surface", "the marble statue", "the warm light"],
        ),
        ("The freshly brewed coffee steamed.", ["The freshly brewed coffee"]),
        # non-spatial
        ("A woman is practicing calligraphy at home.", ["A woman", "practicing calligraphy", "home"]),
        ("", []),
    ],
)  # fmt: skip
def test_noun_phrases(prompt, phrases):
    assert list(text.noun_phrases(prompt)) == phrases


@pytest.mark.parametrize("words", ["on side of", "next to", "near", "on the left of", "on the right of",
                                   "on the bottom of", "on the top of", "on top of", "above", "below", "beside",
                                   "to the left of", "under"])  # fmt: skip
def test_every_relation_between_two_nouns(words):
    assert text.find_relation(f"a airplane {words} a giraffe") == text.Relation("airplane", words, "giraffe")


@pytest.mark.parametrize(
    ("prompt", "relation"),
    [
        ("The black sofa was on the left of the white coffee table.", ("sofa", "on the left of", "coffee table")),
        ("The sleek black cat sat on top of the fluffy white pillow.", ("cat", "on top of", "pillow")),
        ("The brown boots were on top of the wooden shoe rack.", ("boot", "on top of", "shoe rack")),
        ("The soft yellow duckling swam next to the sleek black swan.", ("duckling", "next to", "swan")),
        ("The green plant was on the left side of the orange.", ("plant", "on the left side of", "orange")),
        ("a photo of a cat", None),
        ("a pear and a linear regression", None),  # "near" is inside a word
        ("near a car", None),
    ],
)
def test_relation_of_complex_prompts_and_none(prompt, relation):
    assert text.find_relation(prompt) == (relation and text.Relation(*relation))


@pytest.mark.parametrize(
    ("prompt", "counts"),
    [
        ("six ducks", {"duck": 6}),
        ("two desks, four fish, four frogs, three horses and four trains",
         {"desk": 2, "fish": 4, "frog": 4, "horse": 3, "train": 4}),
        ("three airplanes, two cups, a chair, and four knives", {"airplane": 3, "cup": 2, "chair": 1, "knife": 4}),
        ("six people gathered for a picnic", {"person": 6}),  # a picnic is none of the benchmark's objects
        ("three women and two sheep", {"woman": 3, "sheep": 2}),
        ("four boxes and two berries", {"box": 4, "berry": 2}),
        ("a photo of the sky", {}),
    ],
)  # fmt: skip
def test_counts(prompt, counts):
    assert text.find_counts(prompt) == counts


PLURALS = {"man": "men", "woman": "women", "person": "people", "mouse": "mice", "knife": "knives",
           "strawberry": "strawberries", "butterfly": "butterflies", "peach": "peaches", "tomato": "tomatoes",
           "couch": "couches"} | {same: same for same in ("fish", "deer", "goldfish", "shrimp", "sheep")}  # fmt: skip


def test_singular_of_every_object_of_the_benchmark():
    # examples/dataset/new_objects.txt gives the plurals; all but those above add an s.
    assert {word: text.singular(PLURALS.get(word, word + "s")) for word in OBJECTS} == {word: word for word in OBJECTS}
    assert all(text.singular(word) == word for word in OBJECTS)
    assert [text.singular(word) for word in ("glass", "cactus", "boxes", "houses")] == [
        "glass",
        "cactus",
        "box",
        "house",
    ]


@pytest.mark.parametrize(
    ("prompt", "kind"),
    [
        ("The red hat was on top of the brown coat.", "spatial"),
        ("The blue mug is on top of the green coaster.", "spatial"),
        ("The brown boots were on top of the wooden shoe rack.", "spatial"),
        ("The black phone was resting on the brown charger.", "action"),
        ("The rectangular mirror was hung above the white sink.", "action"),  # "above" is not among the benchmark's
        ("The sleek black cat sat on top of the fluffy white pillow.", "spatial_action"),
        ("The yellow cone was suspended in mid-air near the orange pyramid.", "spatial_action"),
    ],
)
def test_kind_of_complex_prompts(prompt, kind):
    assert text.kind_of(prompt) == kind


def test_adjectives_leave_the_text_for_clip():
    # "coffee" and "rack" are nouns, "orange" the second time too.
    prompt = "The big red hat was on top of the white coat rack near an orange orange."
    assert text.without_adjectives(prompt) == "The hat was on top of the coat rack near an orange."
    assert text.without_adjectives("The smooth, white vase stood there.") == "The vase stood there."


def test_the_column_is_believed_and_the_prompt_fills_in_the_rest():
    column = json.dumps({"phrases": ["a red car"], "relation": ["car", "above", "dog"], "kind": "spatial"})
    asked = text.read_prompt("two cats near a tree", column)
    assert asked.phrases == ("a red car",)
    assert asked.relation == text.Relation("car", "above", "dog")
    assert (asked.counts, asked.kind) == ({"cat": 2}, "spatial")
    assert text.read_prompt("a cat near a dog", json.dumps({"relation": [], "counts": {}})).counts == {}


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("{", r"compbench='\{' is not a JSON string"),
        ('["a car"]', "write a dictionary with keys among"),
        ('{"phrase": []}', "keys among clip_text, counts, kind, phrases, relation"),
        ('{"phrases": "a car"}', "phrases='a car'; write a list of strings"),
        ('{"relation": ["a", "inside", "b"]}', r"words one of on side of, next to"),
        ('{"relation": ["a", "near"]}', r"write \[noun, words, noun\]"),
        ('{"counts": {"cat": 0}}', "whole number of at least 1"),
        ('{"counts": {"cat": true}}', "whole number of at least 1"),
        ('{"kind": "both"}', "kind='both'; write one of spatial, action, spatial_action"),
        ('{"clip_text": 3}', "clip_text=3; write a string"),
    ],
)
def test_a_wrong_column_is_an_error(column, message):
    with pytest.raises(ValueError, match=message):
        text.read_prompt("a cat", column)


def test_a_spacy_model_that_is_absent_is_an_error_not_a_fallback(monkeypatch):
    monkeypatch.setenv("COMPBENCH_SPACY", "no_such_model")
    with pytest.raises(FileNotFoundError, match="unset COMPBENCH_SPACY to read the prompts by rule"):
        text.noun_phrases("a red car")


def test_spacy_gives_phrases_and_adjectives_where_it_is_asked_for(monkeypatch):
    class Word(str):
        text = property(str)
        pos_ = property(lambda self: "ADJ" if self == "red" else "NOUN")

    class Doc(list):
        noun_chunks = [Word("a red car"), Word("the left"), Word("a cat")]

    monkeypatch.setenv("COMPBENCH_SPACY", "en_core_web_sm")
    monkeypatch.setattr(text, "load_spacy", lambda name: lambda sentence: Doc(map(Word, sentence.split())))
    assert text.noun_phrases("a red car on the left of a cat") == ("a red car", "a cat")  # "the left" is not asked
    assert text.without_adjectives("a red car") == "a car"
