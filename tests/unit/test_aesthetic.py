"""Aesthetic scores v1 and v2.5: normalised features through five linear layers, files as published."""

import pytest
import torch
from tiny_clip import SIDE, TOWER, pictures, save_clip, spread
from torch.testing import assert_close
from transformers import SiglipConfig, SiglipModel

from reward_funcs import _clip, _linear_head, aesthetic, aesthetic_v25

V1, V25 = "sac+logos+ava1-l14-linearMSE.pth", "aesthetic_predictor_v2_5.pth"


def head_state(names, features, dtype=torch.float32):
    """Random weights under the published names, widths features -> 5 -> 4 -> 3 -> 2 -> 1."""
    widths = [features, 5, 4, 3, 2, 1]
    state = {}
    for name, wide, narrow in zip(names, widths[:-1], widths[1:], strict=True):
        state[f"{name}.weight"] = torch.randn(narrow, wide).to(dtype)
        state[f"{name}.bias"] = torch.randn(narrow).to(dtype)
    return state


def rated(state, names, features):
    """W5 (W4 (W3 (W2 (W1 f/|f| + b1) + b2) + b3) + b4) + b5, in double precision."""
    hidden = features.double() / features.double().pow(2).sum(-1, keepdim=True).sqrt()
    for name in names:
        hidden = hidden @ state[f"{name}.weight"].double().T + state[f"{name}.bias"].double()
    return hidden[:, 0].float()


@pytest.fixture
def v1(tmp_path):
    """Scorer, head and CLIP, on disk as users have them."""
    model, state = save_clip(tmp_path / "clip"), head_state([f"layers.{i}" for i in (0, 2, 4, 6, 7)], 6)
    torch.save(state, tmp_path / V1)
    scorer = aesthetic.Scorer(head=str(tmp_path), clip=str(tmp_path / "clip"), device="cpu", batch_size=2)
    return scorer, state, model


@pytest.fixture
def v25(tmp_path):
    """The same of v2.5; the hub's SigLIP has both towers, of which one is read, and the head is bfloat16."""
    vision = {**TOWER, "hidden_size": 8, "image_size": SIDE, "patch_size": 8}
    text = {**TOWER, "hidden_size": 8, "vocab_size": 6, "max_position_embeddings": 7}
    model = SiglipModel(SiglipConfig(vision_config=vision, text_config=text)).eval()
    spread(model)
    model.save_pretrained(tmp_path / "siglip")
    state = head_state([f"scoring_head.{i}" for i in (0, 2, 4, 6, 8)], 8, torch.bfloat16)
    torch.save(state, tmp_path / V25)
    scorer = aesthetic_v25.Scorer(head=str(tmp_path), siglip=str(tmp_path / "siglip"), device="cpu", batch_size=2)
    return scorer, state, model


def test_v1_rates_the_normalised_clip_feature(v1):
    scorer, state, model = v1
    images = pictures(3)
    rewards = aesthetic.reward(["a", "b", "c"], [images[0], None, images[2]], scorer)
    pixels = torch.stack([_clip.pixel_values(image, SIDE) for image in (images[0], images[2])])
    with torch.no_grad():
        features = model.get_image_features(pixel_values=pixels).pooler_output
    expected = rated(state, [f"layers.{i}" for i in (0, 2, 4, 6, 7)], features)
    assert rewards[1] is None
    assert_close(torch.tensor([rewards[0], rewards[2]]), expected, rtol=0, atol=1e-4)
    assert abs(rewards[0] - rewards[2]) > 1e-3


def test_v25_rates_the_normalised_siglip_feature(v25):
    scorer, state, model = v25
    images = pictures(3, (20, 12))
    rewards = aesthetic_v25.reward(["a", "b", "c"], [images[0], None, images[2]], scorer)
    pixels = torch.stack([aesthetic_v25.pixel_values(image, SIDE) for image in (images[0], images[2])])
    with torch.no_grad():
        features = model.vision_model(pixel_values=pixels).pooler_output
    expected = rated(state, [f"scoring_head.{i}" for i in (0, 2, 4, 6, 8)], features)
    assert rewards[1] is None
    assert_close(torch.tensor([rewards[0], rewards[2]]), expected, rtol=0, atol=1e-4)
    assert abs(rewards[0] - rewards[2]) > 1e-3


@pytest.mark.parametrize(("module", "given"), [(aesthetic, "v1"), (aesthetic_v25, "v25")])
def test_batches_and_prompts_do_not_change_the_score(module, given, request):
    scorer = request.getfixturevalue(given)[0]
    images = [*pictures(2), *pictures(1, (40, 30)), *pictures(2, (9, 20))]
    together = module.reward(["a"] * 5, images, scorer)
    alone = [module.reward(["another"], [image], scorer)[0] for image in images]
    assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=1e-4)


def test_a_head_of_another_layout_is_an_error():
    names = ("layers.0", "layers.1")
    state = {f"{name}.{part}": torch.zeros(1, 1) for name in names for part in ("weight", "bias")}
    with pytest.raises(
        ValueError, match=r"the head: missing keys layers\.2\.bias, layers\.2\.weight; unexpected keys "
    ):
        _linear_head.linear_head("the head", state, ("layers.0", "layers.2"))


def test_a_head_with_activations_is_not_taken_for_the_linear_one(v1, tmp_path):
    # ava+logos-l14-reluMSE.pth, of the same publisher, has a ReLU after each layer and so other numbers.
    numbers = {"0": "0", "2": "3", "4": "6", "6": "9", "7": "11"}
    renamed = {f"layers.{numbers[key.split('.')[1]]}.{key.split('.')[2]}": value for key, value in v1[1].items()}
    torch.save(renamed, tmp_path / "relu.pth")
    scorer = aesthetic.Scorer(head=str(tmp_path / "relu.pth"), clip="unused", device="cpu")
    with pytest.raises(ValueError, match=r"missing keys layers\.2\..* and 1 more; unexpected keys layers\.11\."):
        aesthetic.reward(["a"], pictures(1), scorer)


@pytest.mark.parametrize(
    ("module", "given", "model", "file", "variable"),
    [
        (aesthetic, "v1", "clip", "sac%2Blogos%2Bava1-l14-linearMSE.pth", "AESTHETIC_HEAD"),
        (aesthetic_v25, "v25", "siglip", "aesthetic_predictor_v2_5.pth", "AESTHETIC_V25_HEAD"),
    ],
)
def test_missing_files_say_what_to_download(module, given, model, file, variable, request, tmp_path):
    scorer = request.getfixturevalue(given)[0]
    lost = module.Scorer(**{**vars(scorer), "head": str(tmp_path / "absent")})
    with pytest.raises(FileNotFoundError, match=rf"curl -L .*github\.com/.*{file}` .*{variable}=DIR"):
        module.reward(["a"], pictures(1), lost)
    lost = module.Scorer(**{**vars(scorer), model: str(tmp_path / "absent")})
    with pytest.raises(FileNotFoundError, match=rf"hf download .*AESTHETIC_.*{model.upper()}=DIR"):
        module.reward(["a"], pictures(1), lost)


def test_a_clip_without_a_tokenizer_is_enough(v1, tmp_path):
    scorer, _, model = v1
    model.save_pretrained(tmp_path / "bare")
    bare = aesthetic.Scorer(head=scorer.head, clip=str(tmp_path / "bare"), device="cpu")
    assert aesthetic.reward(["a"], pictures(1), bare) == aesthetic.reward(["a"], pictures(1), scorer)


def test_the_environment_names_the_weights(monkeypatch):
    monkeypatch.setenv("AESTHETIC_HEAD", "here.pth")
    monkeypatch.setenv("AESTHETIC_V25_SIGLIP", "there")
    assert (aesthetic.Scorer().head, aesthetic.Scorer().clip) == ("here.pth", "openai/clip-vit-large-patch14")
    assert (aesthetic_v25.Scorer().head, aesthetic_v25.Scorer().siglip) == (V25, "there")
