"""Colours by CLIP and the whole GenEval reward, with tiny random models whose answers are known beforehand."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import Zero3
from torch.nn.functional import normalize
from torch.testing import assert_close
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)
from transformers.integrations import deepspeed

from reward_funcs import _geneval_color as color
from reward_funcs import _geneval_detector as detector
from reward_funcs import geneval
from reward_funcs import runtime as _runtime


def clip_tokenizer():
    """CLIP's tokenizer with letters for words: every prompt stays distinct."""
    letters = "abcdefghijklmnopqrstuvwxyz-"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of a few thousand random weights, saved in half precision: it is to run in float32."""
    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokens = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(
        text_config=size | tokens | {"vocab_size": len(tokenizer), "max_position_embeddings": 77},
        vision_config=size | {"image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def cat_detector_folder(tmp_path_factory):
    """A random Mask2Former whose every query is sure to see a cat, saved in half precision."""
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4, out_indices=[1, 2, 3, 4]
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        num_labels=80,
        num_queries=4,
        hidden_dim=32,
        feature_size=32,
        mask_feature_size=32,
        encoder_feedforward_dim=16,
        dim_feedforward=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias[detector.CLASSES.index("cat")] = 50.0
    folder = tmp_path_factory.mktemp("mask2former")
    model.half().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def models(monkeypatch, cat_detector_folder, clip_folder):
    monkeypatch.setattr(detector, "SHORT_SIDE", 64)  # small pictures stay small
    return geneval.Models(detector=cat_detector_folder, clip=clip_folder, device="cpu", batch_size=2)


def pictures(count, size=(48, 32)):
    noise = np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def asks(name, tag="single_object", **more):
    return json.dumps({"tag": tag, "include": [{"class": name, "count": 1} | more]})


def test_direction_is_the_mean_of_unit_vectors():
    # (3, 0) and (0, 4) -> (1, 0) and (0, 1) -> mean (.5, .5) -> (.7071, .7071); unnormalised it would be (.6, .8).
    directions = color.mean_directions(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
    assert_close(directions, torch.full((1, 2), 0.5**0.5), rtol=0, atol=1e-6)


def test_color_has_the_largest_cosine():
    # Colours along the axes of 10 dimensions, in order red, orange, yellow ...
    assert color.nearest_colors(torch.tensor([[0, 2, 1] + [0] * 7, [0] * 9 + [1]]).float(), torch.eye(10)) == [
        "orange",
        "white",
    ]


def test_directions_follow_the_released_prompts(clip_folder):
    classifier = color.load_color_classifier(clip_folder, "cpu")
    directions = color.color_directions(classifier, "cat")
    for index, name in enumerate(
        ["red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white"]
    ):
        texts = [f"a photo of a {name} cat", f"a photo of a {name}-colored cat", f"a photo of a {name} object"]
        units = []
        for text in texts:
            features = classifier.model.get_text_features(**classifier.tokenizer(text, return_tensors="pt"))
            units.append(normalize(features.pooler_output[0].detach(), dim=0))
        assert_close(directions[index], normalize(sum(units), dim=0), rtol=0, atol=1e-5)


def test_object_stands_alone_on_grey():
    picture = Image.new("RGB", (4, 3), "red")
    mask = np.zeros((3, 4), dtype=bool)
    mask[1, 2] = mask[2, 3] = True
    crop = np.asarray(color.object_on_grey(picture, mask, (2.0, 1.0, 4.0, 3.0)))
    red, grey = [255, 0, 0], [153, 153, 153]  # #999
    assert crop.tolist() == [[red, grey], [grey, red]]


def test_reward_of_each_image_in_order(models):
    asked = [asks("cat"), asks("dog"), asks("cat"), asks("cat")]
    images = [*pictures(2), None, *pictures(1, size=(32, 32))]
    prompts = ["a photo of a cat"] * 4
    assert geneval.reward(prompts, images, asked, models=models) == [1.0, 0.0, None, 1.0]
    # Four cats where one is asked: 1 - 3 / 1 = -2 at most, unless a mask came out empty.
    strict = geneval.strict(prompts, images, asked, models=models)
    score = geneval.score(prompts, images, asked, models=models)
    fixed = geneval.score_fixed(prompts, images, asked, models=models)
    for index in (0, 3):
        found = geneval.judge_images([images[index]], [asked[index]], models)[0].kept["cat"]
        assert 1 <= len(found) <= 4
        assert score[index] == 1 - (len(found) - 1)
        assert strict[index] == float(len(found) == 1)
        assert fixed[index] == max(score[index], 0)
    assert score[1] == strict[1] == fixed[1] == 0.0
    assert score[2] is strict[2] is fixed[2] is None


def test_batches_do_not_change_the_verdict(models):
    images = [*pictures(3), *pictures(2, size=(32, 32))]
    together = geneval.judge_images(images, [asks("cat")] * 5, models)
    for image, verdict in zip(images, together, strict=True):
        (alone,) = geneval.judge_images([image], [asks("cat")], models)
        assert [len(box) for box in alone.kept["cat"]] == [len(box) for box in verdict.kept["cat"]]
        assert_close(torch.tensor(alone.kept["cat"]), torch.tensor(verdict.kept["cat"]), rtol=0, atol=1e-4)


def test_color_clause_asks_clip_about_the_best_box_only(models, monkeypatch):
    crops = []

    def all_red(classifier, given, name):
        crops.extend(given)
        assert name == "cat"
        return ["red"] * len(given)

    monkeypatch.setattr(geneval, "classify_colors", all_red)
    image = pictures(1)
    red, blue = asks("cat", "colors", color="red"), asks("cat", "colors", color="blue")
    assert geneval.reward(["p"], image, [red], models=models) == [1.0]
    assert geneval.reward(["p"], image, [blue], models=models) == [0.0]
    assert len(crops) == 2
    left, top, right, bottom, _ = geneval.judge_images(image, [red], models)[0].kept["cat"][0]
    assert crops[0].size == (right - left, bottom - top)


def test_color_is_classified_end_to_end(models):
    image = pictures(1)
    rewards = [
        geneval.reward(["p"], image, [asks("cat", "colors", color=name)], models=models)[0] for name in color.COLORS
    ]
    assert sorted(rewards) == [0.0] * 9 + [1.0]  # one colour, whichever the random weights say


def test_nothing_to_score_loads_nothing():
    absent = geneval.Models(detector="absent/absent", clip="absent/absent", device="cpu")
    assert geneval.reward(["p", "p"], [None, pictures(1)[0]], [asks("cat"), None], models=absent) == [None, None]


def test_mistakes_are_named(models):
    image = pictures(1)
    with pytest.raises(ValueError, match="value='wrong'; write one of correct"):
        geneval.reward(["p"], image, [asks("cat")], value="wrong", models=models)
    with pytest.raises(ValueError, match="2 metadata for 1 completions"):
        geneval.reward(["p"], image, [asks("cat")] * 2, models=models)
    with pytest.raises(TypeError, match=r"completions\[0\] is str; this reward scores PIL images"):
        geneval.reward(["p"], ["text"], [asks("cat")], models=models)
    with pytest.raises(ValueError, match="class='unicorn' is unknown to the detector"):
        geneval.reward(["p"], image, [asks("unicorn")], models=models)
    with pytest.raises(ValueError, match="color='teal'; write one of red"):
        geneval.reward(["p"], image, [asks("cat", "colors", color="teal")], models=models)


def test_missing_weights_say_what_to_download(tmp_path):
    with pytest.raises(FileNotFoundError, match="set GENEVAL_DETECTOR=DIR"):
        detector.load_detector(str(tmp_path / "absent"), "cpu")
    with pytest.raises(FileNotFoundError, match="set GENEVAL_CLIP=DIR"):
        color.load_color_classifier(str(tmp_path / "absent"), "cpu")


def test_environment_names_the_models(monkeypatch):
    monkeypatch.setenv("GENEVAL_DETECTOR", "here")
    monkeypatch.setenv("GENEVAL_CLIP", "there")
    monkeypatch.setenv("GCPO_REWARD_DEVICE", "cuda:3")
    assert (geneval.Models().detector, geneval.Models().clip) == ("here", "there")
    assert _runtime.reward_device(geneval.Models().device) == "cuda:3"
    assert _runtime.reward_device("cpu") == "cpu"


def test_weights_are_loaded_whole_in_a_zero3_run():
    config = Zero3()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        with _runtime.whole_weights():
            assert not deepspeed.is_deepspeed_zero3_enabled()
        assert deepspeed.is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_prompt_of_a_conversation_is_its_last_user_message():
    parts = [{"type": "image"}, {"type": "text", "text": "a cat"}]
    assert _runtime.prompt_text("a dog") == "a dog"
    assert (
        _runtime.prompt_text([{"role": "system", "content": "draw"}, {"role": "user", "content": "a cat"}]) == "a cat"
    )
    assert _runtime.prompt_text([{"role": "user", "content": parts}]) == "a cat"
    with pytest.raises(ValueError, match="has no user message"):
        _runtime.prompt_text([{"role": "system", "content": "draw"}])
