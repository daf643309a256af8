"""CLIPScore: the cosine of picture and prompt, in the three scales of the field, named after its backbone."""

import pytest
import torch
from PIL import Image
from tiny_clip import SIDE, features, pictures, save_clip
from torch.testing import assert_close

from reward_funcs import _clip, clipscore

PROMPTS = ["a c", "d", "a d c"]
COLORS = ("black", "red", "blue", "white")


@pytest.fixture
def model(tmp_path):
    return save_clip(tmp_path / "clip", seed=1)  # gives cosines of both signs


@pytest.fixture
def scorer(tmp_path, model):
    return lambda **options: clipscore.Scorer(**({"model": str(tmp_path / "clip"), "device": "cpu"} | options))


def cosine(model, images, texts):
    pixels = torch.stack([_clip.pixel_values(image, SIDE) for image in images])
    image, text = features(model, images, texts, pixels)
    return (image * text).sum(-1) / (image.pow(2).sum(-1).sqrt() * text.pow(2).sum(-1).sqrt())


def plain():
    return [Image.new("RGB", (SIDE, SIDE), color) for color in COLORS]


def test_it_is_the_cosine(model, scorer):
    images = pictures(3)
    rewards = clipscore.reward(PROMPTS, [images[0], None, images[2]], scorer())
    assert rewards[1] is None
    expected = cosine(model, [images[0], images[2]], ["a c", "a d c"])
    assert_close(torch.tensor([rewards[0], rewards[2]]), expected, rtol=0, atol=1e-5)


def test_x100_keeps_the_sign(model, scorer):
    images, prompts = plain(), ["a c", "d", "a d c", "c"]
    expected = cosine(model, images, prompts) * 100
    assert expected.min() < 0 < expected.max()
    assert_close(torch.tensor(clipscore.reward(prompts, images, scorer(scale="x100"))), expected, rtol=0, atol=1e-3)


def test_hessel_cuts_at_zero_and_writes_the_prefix(monkeypatch, model, scorer):
    monkeypatch.setattr(clipscore, "HESSEL_PREFIX", "p ")  # a word of the tiny tokenizer
    images, prompts = plain(), ["a c", "d", "a d c", "c"]
    rewards = torch.tensor(clipscore.reward(prompts, images, scorer(scale="hessel")))
    cosines = cosine(model, images, [f"p {prompt}" for prompt in prompts])
    assert cosines.min() < 0 < cosines.max()
    assert_close(rewards, 2.5 * cosines.clamp(min=0), rtol=0, atol=1e-4)


def test_the_prefix_is_the_papers():
    assert clipscore.HESSEL_PREFIX + "a cat" == "A photo depicts a cat"


def test_recipes_reach_the_scales_by_name(monkeypatch, scorer):
    monkeypatch.setenv("CLIPSCORE_MODEL", scorer().model)
    monkeypatch.setenv("GCPO_REWARD_DEVICE", "cpu")
    raw = torch.tensor(clipscore.reward(PROMPTS, pictures(3)))
    assert_close(torch.tensor(clipscore.x100(PROMPTS, pictures(3), image_id=[1, 2, 3])), raw * 100)
    own = clipscore.reward(PROMPTS, pictures(3), scorer(scale="hessel"))
    assert clipscore.hessel(PROMPTS, pictures(3)) == own


def test_another_prompt_changes_the_score_and_batches_do_not(scorer):
    images = [*pictures(2), *pictures(1, (40, 30)), *pictures(2, (9, 20))]
    prompts = ["a c", "d", "a d", "c", "a a c d"]
    together = clipscore.reward(prompts, images, scorer(batch_size=2))
    alone = [clipscore.reward([p], [i], scorer())[0] for p, i in zip(prompts, images, strict=True)]
    assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=1e-5)
    other = clipscore.reward(prompts[1:] + prompts[:1], images, scorer())
    assert all(abs(mine - theirs) > 1e-2 for mine, theirs in zip(together, other, strict=True))


def test_the_label_names_backbone_and_scale(monkeypatch):
    assert clipscore.label() == "CLIPScore (openai/clip-vit-large-patch14, cosine)"
    monkeypatch.setenv("CLIPSCORE_MODEL", "openai/clip-vit-base-patch32")
    assert clipscore.label(clipscore.Scorer(scale="hessel")) == "CLIPScore (openai/clip-vit-base-patch32, hessel)"
    with pytest.raises(ValueError, match=r"scale='w'; write one of cosine, x100, hessel"):
        clipscore.Scorer(scale="w")


def test_missing_weights_say_what_to_download(scorer, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"CLIPScore \(.*absent, cosine\).*hf download openai/clip-vit-large.*CLIPSCORE_MODEL="
    ):
        clipscore.reward(["a"], pictures(1), scorer(model=str(tmp_path / "absent")))
