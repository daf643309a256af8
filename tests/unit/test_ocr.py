"""The text measures by hand, and whole pictures read by the models inside the rapidocr package."""

import socket
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from reward_funcs import _ocr_values as values
from reward_funcs import ocr

# measures


@pytest.mark.parametrize(
    ("read", "asked", "expected"),
    [
        (["open 24 hours"], ["Open 24 Hours"], 1.0),
        (["hours", "open"], ["open 24 hours"], 2 / 3),  # any order, any line
        (["bla bla"], ["bla bla bla"], 2 / 3),  # a multiset: each reading counts once
        (["bla bla bla"], ["bla"], 1.0),
        (["opener"], ["open"], 0.0),  # a part of a word is no word
        ([], ["open"], 0.0),
        (["left", "right"], ["left", "right"], 1.0),  # two quoted texts
    ],
)
def test_word_accuracy(read, asked, expected):
    assert values.word_accuracy([(text, 0.9) for text in read], asked) == expected


@pytest.mark.parametrize(
    ("read", "asked", "expected"),
    [
        (["HELLO"], "hello", 1.0),
        (["helo"], "hello", 4 / 5),  # one missing of 5
        (["hello you"], "hello", 5 / 9),  # 4 too many of 9: the longer text divides
        (["hello", "you"], "hello  you", 1.0),  # line breaks and double blanks are one blank
        (["xyz"], "hello", 0.0),
        ([], "hello", 0.0),
    ],
)
def test_normalised_edit_distance(read, asked, expected):
    assert values.ned([(text, 0.9) for text in read], [asked]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("read", "asked", "expected"),
    [
        (["Hel lo"], "hello", 1.0),  # blanks do not count
        (["well", "hello there"], "hello", 1.0),  # a part of what was read
        (["helo"], "hello", 4 / 5),
        (["helloo"], "helo", 1 / 2),  # 2 edits of 4; "helo" is no part of "helloo"
        (["something else entirely"], "hello", 0.0),  # 18 edits at least, clipped at 5
        ([], "hello", 0.0),
    ],
)
def test_flow_grpo(read, asked, expected):
    assert values.flow_grpo([(text, 0.9) for text in read], [asked]) == pytest.approx(expected, abs=1e-12)


def test_flow_grpo_reads_the_first_quoted_text():
    assert values.flow_grpo([("left", 0.9)], ["left", "right"]) == 1.0


def test_var_rl_of_a_near_miss():
    # completeness (.9 + 0) / 2 = .45; "by" and "bye": 1 - 1/3, so similarity (1 * .9 + 2/3 * .8) / 2 = .716667;
    # "votebye" has one e more than "voteby": .6 * 1 / (7 + 6) = .046154
    reward = values.var_rl([("vote", 0.9), ("bye", 0.8)], ["Vote by"])
    assert reward == pytest.approx(0.45 + 2.15 / 3 - 0.6 / 13, abs=1e-12)


def test_var_rl_takes_the_lowest_confidence_of_equal_words():
    # completeness .5; the first "no" is the best likeness, similarity .9; characters n, o too many: .6 * 2 / (2 + 4)
    assert values.var_rl([("no", 0.9), ("no", 0.5)], ["no"]) == pytest.approx(0.5 + 0.9 - 0.2, abs=1e-12)


def test_var_rl_without_text_is_below_a_wrong_word():
    assert values.var_rl([], ["open"]) == pytest.approx(-0.6, abs=1e-12)
    # "oven": 3 of 4 letters, similarity .75; v for p: .6 * 2 / 8
    assert values.var_rl([("oven", 1.0)], ["open"]) == pytest.approx(0.75 - 0.15, abs=1e-12)


# targets


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ('a sign that says "Open"', ["Open"]),
        ("a sign that says “Open 24 hours”", ["Open 24 hours"]),
        ('"left" beside "right"', ["left", "right"]),
        ("ein Schild mit „Geöffnet“", ["Geöffnet"]),
        ("une enseigne «Ouvert»", ["Ouvert"]),
        ("it's a dog's \"bowl\"", ["bowl"]),
        ([{"role": "user", "content": 'a "word"'}], ["word"]),
    ],
)
def test_target_is_what_stands_in_quotes(prompt, texts):
    assert ocr.targets(prompt) == texts


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("a sign that says Open", "quotes no text; put what the picture should say in double quotes"),
        ("a dog's 'bowl'", "quotes no text"),
        ('a sign that says ""', "has empty quotes"),
        ("a sign that says “ ”", "has empty quotes"),
        ('a 12" record that says "Hi"', 'odd number of "'),
        ('a sign that says "Open', 'odd number of "'),
    ],
)
def test_prompt_without_a_target_is_an_error(prompt, words):
    with pytest.raises(ValueError, match=words):
        ocr.targets(prompt)
    with pytest.raises(ValueError, match=words):
        ocr.check_rows({"prompt": ['a "fine" one', prompt]})


# the whole way, with real weights


def picture(text, size=(384, 384), font=48):
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).multiline_text((20, 60), text, fill="black", font=ImageFont.load_default(font))
    return image


@pytest.fixture
def no_network(monkeypatch):
    """A connection is an error of the test."""

    def refuse(*args, **kwargs):
        raise AssertionError("OCR opened a socket")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    ocr.load_engine.cache_clear()


def test_rendered_text_is_read(no_network):
    pictures = [picture("OPEN\n24 HOURS"), picture("GRPO 2026"), picture(""), picture("BANANA")]
    prompts = ['a sign that says "open 24 hours"', "the words “GRPO 2026”", 'a "word"', 'a "KIWI" crate']
    assert ocr.reward(prompts, pictures) == ocr.flow_grpo(prompts, pictures)
    # "banana" for "kiwi" takes 6 edits, clipped at 4.
    assert ocr.flow_grpo(prompts, pictures) == [1.0, 1.0, 0.0, 0.0]
    assert ocr.word_accuracy(prompts, pictures) == [1.0, 1.0, 0.0, 0.0]
    assert ocr.ned(prompts, pictures) == [1.0, 1.0, 0.0, 0.0]
    open_sign, grpo, blank, banana = ocr.var_rl(prompts, pictures)
    assert min(open_sign, grpo) > 1.95  # 2 times a confidence near 1
    assert blank == pytest.approx(-0.6)
    assert banana == pytest.approx(-0.6, abs=1e-6)  # no letter in common: no similarity, the whole penalty


def test_a_picture_without_text_has_0_and_one_that_fails_has_none(monkeypatch, caplog):
    engine = ocr.load_engine(ocr.Reader())

    def failing(pixels):
        if pixels.shape[0] == 64:
            raise RuntimeError("no memory left")
        return engine(pixels)

    monkeypatch.setattr(ocr, "load_engine", lambda reader: failing)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    small = Image.new("RGB", (64, 64))
    assert ocr.reward(['"Hi"'] * 4, [noise, small, None, picture("Hi")]) == [0.0, None, None, 1.0]
    assert "a picture of (64, 64) could not be read, so it has no reward: RuntimeError('no memory left')" in caplog.text


def test_modes_and_shapes_of_pictures_do_not_matter():
    wide, grey = picture("Hello", size=(800, 200)), picture("Hello").convert("L")
    seethrough = picture("Hello").convert("RGBA")
    assert ocr.ned(['"Hello"'] * 3, [wide, grey, seethrough]) == [1.0, 1.0, 1.0]


def test_the_engine_gets_its_channels_in_its_order():
    given = []

    def engine(pixels):
        given.append(pixels)
        return SimpleNamespace(txts=None)

    assert ocr.read(engine, Image.new("RGB", (2, 1), "red")) == []
    assert given[0].tolist() == [[[0, 0, 255], [0, 0, 255]]]  # blue, green, red


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ValueError, match="value='wer'; write one of flow_grpo"):
        ocr.reward(['"Hi"'], [picture("Hi")], value="wer")
    with pytest.raises(TypeError, match="this reward scores PIL images"):
        ocr.reward(['"Hi"'], ["Hi"])
    monkeypatch.setattr(ocr, "PACKAGES", ("onnxruntime", "absent_package"))
    with pytest.raises(ModuleNotFoundError, match=r"needs absent_package: run `pip install 'gcpo_trl\[ocr\]'`"):
        ocr.check_rows({"prompt": []})


def test_a_package_without_the_models_is_named(monkeypatch):
    monkeypatch.setattr(ocr, "DETECTION", "absent.onnx")
    with pytest.raises(FileNotFoundError, match=r"does not carry absent\.onnx.*pip install rapidocr==3\.10\.0"):
        ocr.load_engine(ocr.Reader(side=123))


def test_environment_sets_the_side(monkeypatch):
    assert ocr.Reader().side == 320
    monkeypatch.setenv("OCR_SIDE", "640")
    assert ocr.Reader().side == 640
