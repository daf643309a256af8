"""PickScore: exp(logit_scale) times the cosine, in the scale of whoever uses it."""

import math

import pytest
import torch
from tiny_clip import SIDE, features, pictures, save_clip, save_tokenizer
from torch.testing import assert_close
from transformers import CLIPVisionConfig, CLIPVisionModel

from reward_funcs import _clip, pickscore

PROMPTS = ["a c", "d", "a d c"]


@pytest.fixture
def model(tmp_path):
    return save_clip(tmp_path / "model")


@pytest.fixture
def scorer(tmp_path, model):
    save_tokenizer(tmp_path / "processor")
    places = {"model": str(tmp_path / "model"), "tokenizer": str(tmp_path / "processor")}
    return lambda **options: pickscore.Scorer(**(places | {"device": "cpu"} | options))


def expected(model, images, texts):
    """20 * <i, t> / (|i| |t|), written out; features are of pictures prepared as tested in test_clip_pixels."""
    pixels = torch.stack([_clip.pixel_values(image, SIDE) for image in images])
    image, text = features(model, images, texts, pixels)
    return 20 * (image * text).sum(-1) / (image.pow(2).sum(-1).sqrt() * text.pow(2).sum(-1).sqrt())


def test_it_is_the_scaled_cosine(tmp_path, model, scorer):
    model.logit_scale.data.fill_(math.log(20))
    model.save_pretrained(tmp_path / "model")
    images = pictures(3)
    rewards = pickscore.reward([PROMPTS[0], "d", PROMPTS[2]], [images[0], None, images[2]], scorer())
    assert rewards[1] is None
    found = torch.tensor([rewards[0], rewards[2]])
    assert_close(found, expected(model, [images[0], images[2]], ["a c", "a d c"]), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("scale", "divisor"), [("raw", 1), ("flow_grpo", 26), ("gcpo", 100)])
def test_the_scales_divide(scorer, scale, divisor):
    raw = pickscore.reward(PROMPTS, pictures(3), scorer())
    scaled = pickscore.reward(PROMPTS, pictures(3), scorer(scale=scale))
    assert_close(torch.tensor(scaled) * divisor, torch.tensor(raw), rtol=1e-6, atol=0)


def test_recipes_reach_the_scales_by_name(monkeypatch, scorer):
    monkeypatch.setenv("PICKSCORE_MODEL", scorer().model)
    monkeypatch.setenv("PICKSCORE_TOKENIZER", scorer().tokenizer)
    monkeypatch.setenv("GCPO_REWARD_DEVICE", "cpu")
    raw = torch.tensor(pickscore.reward(PROMPTS, pictures(3)))
    assert_close(torch.tensor(pickscore.flow_grpo(PROMPTS, pictures(3), image_id=[1, 2, 3])) * 26, raw)
    assert_close(torch.tensor(pickscore.gcpo(PROMPTS, pictures(3))) * 100, raw)


def test_another_prompt_changes_the_score_and_batches_do_not(scorer):
    images = [*pictures(2), *pictures(1, (40, 30)), *pictures(2, (9, 20))]
    prompts = ["a c", "d", "a d", "c", "a a c d"]
    together = pickscore.reward(prompts, images, scorer(batch_size=2))
    alone = [pickscore.reward([p], [i], scorer())[0] for p, i in zip(prompts, images, strict=True)]
    assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=1e-4)
    other = pickscore.reward(prompts[1:] + prompts[:1], images, scorer())
    assert all(abs(mine - theirs) > 1e-2 for mine, theirs in zip(together, other, strict=True))


def test_a_prompt_longer_than_the_model_reads_is_cut(scorer):
    # Seven places: start, five words, end.
    long, cut = pickscore.reward(["a c d a c d d d", "a c d a c"], pictures(1) * 2, scorer())
    assert long == pytest.approx(cut, abs=1e-5)


def test_missing_weights_say_what_to_download(scorer, tmp_path):
    absent = str(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"hf download yuvalkirstain/PickScore_v1 .*PICKSCORE_MODEL=DIR"):
        pickscore.reward(["a"], pictures(1), scorer(model=absent))
    with pytest.raises(FileNotFoundError, match=r"hf download laion/CLIP-ViT-H-14.*PICKSCORE_TOKENIZER=DIR"):
        pickscore.reward(["a"], pictures(1), scorer(tokenizer=absent))


def test_a_folder_with_half_a_model_is_an_error_not_a_random_score(scorer, tmp_path, model):
    half = {key: value for key, value in model.state_dict().items() if not key.startswith("text_projection")}
    model.save_pretrained(tmp_path / "half", state_dict=half)
    with pytest.raises(ValueError, match=r"missing keys text_projection\.weight"):
        pickscore.reward(["a"], pictures(1), scorer(model=str(tmp_path / "half")))
    CLIPVisionModel(CLIPVisionConfig(**model.config.vision_config.to_dict())).save_pretrained(tmp_path / "vision")
    with pytest.raises(ValueError, match="missing keys logit_scale"):
        pickscore.reward(["a"], pictures(1), scorer(model=str(tmp_path / "vision")))


def test_an_unknown_scale_is_refused():
    with pytest.raises(ValueError, match=r"scale='x'; write one of raw, flow_grpo, gcpo"):
        pickscore.Scorer(scale="x")
