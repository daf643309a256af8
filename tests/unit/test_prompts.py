"""Prompt sets: the benchmark's own bytes, training prompts that avoid it, files of prompts, and the command."""

import argparse
import hashlib
import json
from collections import Counter
from itertools import permutations, product

import pytest

from gcpo_trl.cli import prompts as command
from gcpo_trl.prompts import canonical_key, generate, load, official
from gcpo_trl.prompts.files import STYLES
from gcpo_trl.prompts.geneval import (
    COLORED,
    DRAW,
    POSSIBLE,
    WEIGHTS,
    Counts,
    clause,
    official_keys,
    official_prompts,
    official_text,
    shares,
)
from reward_funcs.geneval import CLASSES, COLORS, RELATIONS, TAGS, validate_metadata

# sha256 of prompts/evaluation_metadata.jsonl in djghosh13/geneval
OFFICIAL = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
A_TAG = {"single_object": 80, "two_object": 99, "counting": 80, "colors": 94, "position": 100, "color_attr": 100}


@pytest.fixture(scope="module")
def published():
    """The published size and weights."""
    return generate(50_000, seed=0)


# the benchmark


def test_the_official_file_is_redrawn_byte_for_byte():
    assert hashlib.sha256(official_text().encode()).hexdigest() == OFFICIAL


def test_there_are_553_official_prompts():
    assert Counter(metadata["tag"] for metadata in official()) == A_TAG
    assert sum(A_TAG.values()) == len(official_prompts()) == 553


def test_another_stream_of_numbers_is_an_error_not_another_benchmark(monkeypatch):
    monkeypatch.setattr("gcpo_trl.prompts.geneval.SEED", 44)
    with pytest.raises(RuntimeError, match=r"draws other prompts than GenEval's .* install the numpy of constraints"):
        official_text.__wrapped__()


# canonical keys


def asked(*include, tag="position", **more):
    return {"tag": tag, "include": list(include), **more}


def placed(moved, relation, reference):
    return asked(clause(reference), clause(moved, position=[relation, 0]))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (placed("dog", "left of", "cat"), placed("cat", "right of", "dog")),
        (placed("dog", "above", "cat"), placed("cat", "below", "dog")),
        (asked(clause("dog"), clause("cat"), tag="two_object"), asked(clause("cat"), clause("dog"), tag="two_object")),
        (
            asked(clause("dog", color="red"), clause("cat", color="blue"), tag="color_attr"),
            asked(clause("cat", color="blue"), clause("dog", color="red"), tag="color_attr"),
        ),
        # Three clauses, their order and the indices into it changed: the dog is left of the cat, and there is a cup.
        (
            asked(clause("cat"), clause("dog", position=["left of", 0]), clause("cup")),
            asked(clause("cup"), clause("cat"), clause("dog", position=["left of", 1])),
        ),
        # Words and key order do not count, nor whether it is JSON.
        (
            asked(clause("dog"), tag="single_object", prompt="a photo of a dog"),
            '{"include": [{"count": 1, "class": "dog"}], "tag": "single_object"}',
        ),
    ],
)
def test_the_same_picture_has_one_key(one, other):
    assert canonical_key(one) == canonical_key(other)
    assert hash(canonical_key(one)) == hash(canonical_key(other))


def test_other_pictures_have_other_keys():
    different = [
        placed("dog", "left of", "cat"),
        placed("dog", "right of", "cat"),
        placed("dog", "above", "cat"),
        placed("dog", "below", "cat"),
        asked(clause("dog"), clause("cat"), tag="two_object"),
        asked(clause("dog", color="red"), clause("cat", color="blue"), tag="color_attr"),
        asked(clause("dog", color="blue"), clause("cat", color="red"), tag="color_attr"),
        asked(clause("dog", 2), tag="counting"),
        asked(clause("dog", 2), tag="counting", exclude=[clause("dog", 3)]),
        asked(clause("dog", 3), tag="counting", exclude=[clause("dog", 4)]),
        asked(clause("dog", color="red"), tag="colors"),
        asked(clause("dog"), tag="single_object"),
    ]
    assert len({canonical_key(metadata) for metadata in different}) == len(different)


def test_a_key_of_broken_metadata_is_refused():
    with pytest.raises(ValueError, match="position refers to clause -1"):
        canonical_key(asked(clause("cat"), clause("dog", position=["left of", -1])))


def test_the_benchmark_asks_for_one_picture_twice():
    prompts = {metadata["prompt"]: canonical_key(metadata) for metadata in official()}
    assert prompts["a photo of a laptop left of a cow"] == prompts["a photo of a cow right of a laptop"]
    assert len(set(prompts.values())) == len(official_keys()) == 552


def test_how_many_keys_a_tag_has():
    keys = {
        "two_object": {canonical_key(asked(clause(a), clause(b))) for a, b in permutations(CLASSES, 2)},
        "counting": {canonical_key(asked(clause(a, n))) for a, n in product(CLASSES, (2, 3, 4))},
        "colors": {canonical_key(asked(clause(a, color=c))) for a, c in product(COLORED, COLORS)},
        "position": {canonical_key(placed(a, r, b)) for (a, b), r in product(permutations(CLASSES, 2), RELATIONS)},
    }
    counted = {tag: len(found) for tag, found in keys.items()}
    # 79 x 78 / 2 pairs of things, each with 10 x 9 pairs of colours
    assert counted | {"single_object": 80, "color_attr": 277_290} == POSSIBLE
    assert counted == {"two_object": 3160, "counting": 240, "colors": 790, "position": 12_640}


# training prompts


def test_no_training_row_asks_for_an_official_picture(published):
    drawn = [json.loads(row["metadata"]) for row in published.rows]
    assert len(drawn) == 50_000
    assert not {canonical_key(metadata) for metadata in drawn} & set(official_keys())
    assert not {metadata["prompt"] for metadata in drawn} & official_prompts()


def test_every_row_passes_the_rewards_check_and_names_its_prompt(published):
    for row in published.rows[:5000]:
        assert set(row) == {"prompt", "metadata"}
        assert validate_metadata(row["metadata"], CLASSES, COLORS)["prompt"] == row["prompt"]


def test_the_published_weights_hold_after_the_filter(published):
    # 50,000 x 7, 5, 3, 1, 1 of 17: 20588.24, 14705.88, 8823.53, 2941.18, 2941.18; two rows go to .88 and .53
    expected = {"position": 20588, "counting": 14706, "color_attr": 8824, "colors": 2941, "two_object": 2941}
    assert Counter(json.loads(row["metadata"])["tag"] for row in published.rows) == expected
    assert {tag: count.kept for tag, count in published.counts.items()} == expected | {"single_object": 0}


def test_the_counts_add_up(published):
    for tag, count in published.counts.items():
        assert count.drawn == count.same_words + count.other_words + count.repeated + count.kept
        drawn = [row["metadata"] for row in published.rows if json.loads(row["metadata"])["tag"] == tag]
        assert count.distinct == len({canonical_key(metadata) for metadata in drawn})
    assert published.counts["single_object"] == Counts()
    # 80 of 240 counting prompts are the benchmark's: a third of the draws, and all of the other 160 come up.
    counting = published.counts["counting"]
    assert counting.same_words / counting.drawn == pytest.approx(1 / 3, abs=0.01)
    assert (counting.other_words, counting.repeated, counting.distinct) == (0, 0, 160)
    # Comparing words alone would have kept these.
    assert published.counts["position"].other_words > 0 and published.counts["two_object"].other_words > 0


def test_rows_are_shuffled(published):
    first = Counter(json.loads(row["metadata"])["tag"] for row in published.rows[:1700])
    assert first["position"] == pytest.approx(700, abs=100) and first["two_object"] == pytest.approx(100, abs=50)


def test_the_seed_decides_the_rows():
    assert generate(500, seed=7).rows == generate(500, seed=7).rows
    # Not only their order.
    prompts = [sorted(row["prompt"] for row in generate(500, seed).rows) for seed in (7, 8)]
    assert prompts[0] != prompts[1]


def test_a_weight_changes_no_other_tags_draws():
    def prompts(drawn):
        return {row["prompt"] for row in drawn.rows if json.loads(row["metadata"])["tag"] == "colors"}

    assert prompts(generate(20, 1, {"colors": 1, "position": 1})) == prompts(
        generate(30, 1, {"colors": 1, "counting": 2})
    )


def test_unique_rows_may_use_up_a_tag():
    drawn = generate(160, 0, {"counting": 1}, unique=True)
    keys = {canonical_key(row["metadata"]) for row in drawn.rows}
    count = drawn.counts["counting"]
    assert len(keys) == count.distinct == 160 and len(keys | set(official_keys())) == 552 + 160
    assert count.repeated > 0 and count.drawn == 160 + count.same_words + count.repeated


def test_shares_go_to_the_largest_fractions():
    assert shares(17, WEIGHTS) == WEIGHTS
    # 4.12, 2.94, 1.76, 0.59, 0.59: floors make 7, the three left go to .94, .76 and the first .59
    assert shares(10, WEIGHTS) == dict.fromkeys(TAGS, 0) | {
        **{"position": 4, "counting": 3, "color_attr": 2, "two_object": 1}
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n=0 rows; ask for at least 1"),
        ({"seed": -1}, "seed=-1; give a whole number of at least 0"),
        ({"weights": {"colour": 1}}, "unknown tag 'colour'; write single_object, two_object"),
        ({"weights": {"colors": -1}}, "weight colors=-1; write a finite number"),
        ({"weights": {"colors": float("nan")}}, "weight colors=nan; write a finite number"),
        ({"weights": {"colors": 0}}, "all weights are 0"),
        (
            {"weights": {"single_object": 1}},
            "all 80 prompts of single_object are the benchmark's; give it the weight 0",
        ),
        ({"n": 161, "weights": {"counting": 1}, "unique": True}, "161 rows of counting, but only 160 of its prompts"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(**{"n": 10, **arguments})


def test_every_tag_is_drawn_in_its_own_grammar():
    assert tuple(DRAW) == TAGS
    for metadata in official():
        names = [asked["class"] for asked in metadata["include"]]
        assert "person" not in names or metadata["tag"] not in ("colors", "color_attr")
    prompts = official_prompts()
    # The benchmark's own grammar: no irregular plurals, the article by the first letter.
    assert {"a photo of two backpacks", "a photo of a bench", "a photo of an orange"} <= prompts
    assert {"a photo of a stop sign above a fork", "a photo of a blue pizza and a yellow baseball glove"} <= prompts


# files


def file(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.txt", "a cat\n\n  a dog \r\n", [{"prompt": "a cat"}, {"prompt": "a dog"}]),
        ("a.txt", b"\xef\xbb\xbfa caf\xc3\xa9", [{"prompt": "a café"}]),
        ("a.json", '["a cat",\n "a dog"]', [{"prompt": "a cat"}, {"prompt": "a dog"}]),
        ("a.json", '{"prompt": "a cat"}\n"a dog"\n', [{"prompt": "a cat"}, {"prompt": "a dog"}]),
        # U+2028 ends a line for str.splitlines, not for JSON.
        ("a.jsonl", '{"prompt": "a\u2028cat", "n": 2}\n', [{"prompt": "a\u2028cat", "n": 2}]),
        (
            "a.jsonl",
            '{"prompt": "a cat", "metadata": {"tag": ["x", 0]}}\n{"prompt": "a dog", "id": 1}\n',
            [
                {"prompt": "a cat", "metadata": '{"tag": ["x", 0]}', "id": None},
                {"prompt": "a dog", "metadata": None, "id": 1},
            ],
        ),
        (
            "a.jsonl",
            '{"prompt": [{"role": "user", "content": "hi"}]}',
            [{"prompt": [{"role": "user", "content": "hi"}]}],
        ),
        # DrawBench
        (
            "a.csv",
            'Prompts,Category\nA red car.,Colors\n"A dog, and a ""cat"".",Counting\n',
            [{"prompt": "A red car.", "Category": "Colors"}, {"prompt": 'A dog, and a "cat".', "Category": "Counting"}],
        ),
        # PartiPrompts: quotes are text, the last cell may be empty
        (
            "a.tsv",
            'Prompt\tCategory\tNote\n"G I G G L E" painted\tArts\t\n',
            [{"prompt": '"G I G G L E" painted', "Category": "Arts", "Note": ""}],
        ),
    ],
)
def test_files_are_read_as_rows(tmp_path, name, content, rows):
    assert load(file(tmp_path, name, content)) == rows
    assert load(str(tmp_path / name)) == rows


def test_the_benchmark_has_a_name_and_its_own_file_reads_the_same(tmp_path):
    rows = load("geneval")
    assert len(rows) == 553 and [json.loads(row["metadata"]) for row in rows] == official()
    assert load(file(tmp_path, "evaluation_metadata.jsonl", official_text())) == rows


def test_hpsv2s_folder_has_a_style_for_each_row(tmp_path):
    for style in STYLES:
        file(tmp_path, f"{style}.json", json.dumps([f"{style} {i}" for i in range(2)]))
    file(tmp_path, "drawbench.json", '["not one of the four"]')
    assert load(tmp_path)[:3] == [
        {"prompt": "anime 0", "style": "anime"},
        {"prompt": "anime 1", "style": "anime"},
        {"prompt": "concept-art 0", "style": "concept-art"},
    ]
    assert Counter(row["style"] for row in load(tmp_path)) == dict.fromkeys(STYLES, 2)
    (tmp_path / "photo.json").unlink()
    with pytest.raises(ValueError, match=r"has no photo.json; HPSv2's benchmark has anime, concept-art"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", " \n\n", "a.txt has no prompts; write at least one"),
        ("a.txt", b"a cat\na \xff dog\n", "a.txt, line 2: byte 0xff is not UTF-8"),
        ("a.pkl", "a cat", "a.pkl has no known ending; give a .txt, .json"),
        (
            "a.jsonl",
            '{"prompt": "a cat"}\n\n{"prompt": "a dog"\n',
            "a.jsonl, line 3: Expecting ',' delimiter at column",
        ),
        ("a.jsonl", '{"text": "a cat"}', r"a.jsonl, line 1: no 'prompt' among \['text'\]; name the caption 'prompt'"),
        ("a.jsonl", '{"prompt": " "}', "a.jsonl, line 1: the prompt is ' '; write a string that is not empty"),
        ("a.jsonl", '"a cat"\n{"prompt": null}', "a.jsonl, line 2: the prompt is None"),
        ("a.jsonl", '{"prompt": []}', r"a.jsonl, line 1: the prompt is \[\]"),
        ("a.jsonl", "3", "a.jsonl, line 1: the entry is 3; write a string or an object"),
        ("a.json", '["a cat",\n "a dog"', "a.json, line 2: Expecting ',' delimiter"),
        ("a.json", '["a cat", ""]', "a.json, entry 2: the prompt is ''"),
        ("a.json", "[]", "a.json has no prompts"),
        ("a.csv", "caption,id\na cat,1\n", r"a.csv, line 1: the header \['caption', 'id'\] has 0 prompt columns"),
        ("a.csv", "prompt,Prompts\na,b\n", "a.csv, line 1: .* has 2 prompt columns; name exactly one 'prompt'"),
        ("a.csv", "prompt,id,id\na,1,2\n", "a.csv, line 1: .* has a name twice"),
        ("a.csv", "prompt,id\na cat,1\na dog, and a cat,2\n", "a.csv, line 3: 3 cells under a header of 2"),
        ("a.csv", "prompt,id\n,1\n", "a.csv, line 2: the prompt is ''"),
        ("a.csv", 'prompt,id\n"a cat,1\n', "a.csv, line 2: unexpected end of data"),
    ],
)
def test_a_bad_file_is_refused_with_its_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        load(file(tmp_path, name, content))


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"'data/none.csv' is not a file"):
        load("data/none.csv")


# the command


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.prepare(parser.parse_args(["geneval", *map(str, words)]))()


def test_the_command_writes_the_official_file(tmp_path, capsys):
    out = tmp_path / "deep" / "official.jsonl"
    assert run("--official", "--out", out) == 0
    assert hashlib.sha256(out.read_bytes()).hexdigest() == OFFICIAL
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["two_object", "99"] in printed and ["all", "553"] in printed


def test_the_command_writes_training_rows_and_prints_the_counts(tmp_path, capsys):
    out = tmp_path / "train.jsonl"
    assert run("--n", 40, "--seed", 5, "--weights", "counting=1", "colors=3", "--unique", "--out", out) == 0
    drawn = generate(40, 5, {"counting": 1, "colors": 3}, unique=True)
    assert load(out) == drawn.rows
    lines = capsys.readouterr().out.splitlines()
    head, table = lines[0].split(), {line.split()[0]: line.split()[1:] for line in lines[1:8]}
    assert head == ["drawn", "same", "words", "other", "words", "repeated", "kept", "distinct"]
    assert table["counting"][-2:] == ["10", "10"] and table["colors"][-2:] == ["30", "30"]
    assert table["all"][0] == str(sum(count.drawn for count in drawn.counts.values()))


def test_a_file_is_replaced_only_by_force(tmp_path):
    out = file(tmp_path, "mine.jsonl", "mine")
    with pytest.raises(ValueError, match="exists; give another --out, or --force to replace it"):
        run("--official", "--out", out)
    assert out.read_text() == "mine"
    run("--official", "--force", "--out", out)
    assert len(load(out)) == 553


def test_no_part_of_a_file_is_left_behind(tmp_path, monkeypatch):
    def full(path, data):
        with path.open("wb") as stream:
            stream.write(data[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="no space left"):
        run("--official", "--out", tmp_path / "official.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--official", "--n", "5", "--unique"], "--official are 553 fixed prompts; leave out --n, --unique"),
        (["--weights", "counting"], "--weights 'counting'; write TAG=WEIGHT"),
        (["--weights", "counting=many"], "--weights 'counting=many'; write TAG=WEIGHT"),
        (["--unique"], "14706 rows of counting, but only 160"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run(*words, "--out", tmp_path / "train.jsonl")
    assert list(tmp_path.iterdir()) == []
