"""3-in-1: which parts are averaged for which prompt, and CLIP's part by a forward pass of its own."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from reward_funcs import blip_vqa, compbench_3in1, spatial_2d
from reward_funcs.compbench_3in1 import Models
from reward_funcs.spatial_2d import BoxDetector

SPATIAL = "The red hat was on top of the brown coat."
ACTION = "The shiny silver car zoomed past the old rusty truck."
BOTH = "The sleek black cat sat next to the fluffy white pillow."
SIDE = 16


def tokenizer():
    letters = "abcdefghijklmnopqrstuvwxyz.,"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    words = tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    config = CLIPConfig(
        text_config=size | ids | {"vocab_size": len(words), "max_position_embeddings": 77},
        vision_config=size | {"image_size": SIDE, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


def pictures(count):
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)) for _ in range(count)]


def cosine(folder, image, text):
    """The cosine of a picture and a text, with the normalisation written out."""
    model, tokens = CLIPModel.from_pretrained(folder).eval(), tokenizer()(text, return_tensors="pt")
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        outputs = model(**tokens, pixel_values=pixels[None])
    return float((outputs.image_embeds * outputs.text_embeds).sum())


@pytest.fixture
def models(folder, monkeypatch):
    """Attribute binding answers 0.9; two boxes stand side by side, 200 of 479 apart."""
    monkeypatch.setattr(blip_vqa, "chances_of_yes", lambda scorer, images, phrases: [[0.9]] * len(images))

    def find(images, nouns):
        boxes = [(0, 0, 10, 10), (200, 200, 210, 210)]
        return [
            [{"class": noun, "box": box, "score": 0.8} for noun, box in zip(sorted(each), boxes, strict=True)]
            for each in nouns
        ]

    detector = BoxDetector("by hand", None, find)
    return Models(spatial=spatial_2d.Models(detector=detector), clip=folder, device="cpu", batch_size=2)


def frame():
    return Image.new("RGB", (479, 479))


def test_each_kind_averages_its_parts(models, folder):
    images = [frame(), *pictures(1), frame(), frame()]
    rewards = compbench_3in1.reward([SPATIAL, ACTION, BOTH, SPATIAL], images, models=models)
    near = 0.4 + 0.5 * 150 / 200  # both axes 200 apart
    black = frame().resize((SIDE, SIDE))
    similar = [
        cosine(folder, images[1], "The car zoomed past the truck."),
        cosine(folder, black, "The cat sat next to the pillow."),
    ]
    assert rewards == [
        pytest.approx(0.9 / 2, abs=1e-5),  # "on top of" has no branch in the released rule: .4 is cut to 0
        pytest.approx((0.9 + similar[0]) / 2, abs=1e-5),
        pytest.approx((0.9 + near + similar[1]) / 3, abs=1e-5),
        pytest.approx(0.9 / 2, abs=1e-5),
    ]
    assert abs(similar[0] - similar[1]) > 0.01


def test_the_value_of_the_spatial_part_is_passed_on(models):
    (graded,) = compbench_3in1.reward([SPATIAL], [frame()], value="graded", models=models)
    assert graded == pytest.approx((0.9 + 0.4) / 2, abs=1e-6)  # found, but coat is up left of hat: place 0


def test_the_column_decides_kind_and_text(models, folder):
    (image,) = pictures(1)
    column = json.dumps({"kind": "action", "clip_text": "a cat"})
    (value,) = compbench_3in1.reward([SPATIAL], [image], [column], models=models)
    assert value == pytest.approx((0.9 + cosine(folder, image, "a cat")) / 2, abs=1e-5)


def test_a_part_that_cannot_be_judged_leaves_the_picture_out(models):
    column = json.dumps({"kind": "spatial"})  # but no relation is to be found
    assert compbench_3in1.reward(["a cat", ACTION], [frame(), None], [column, None], models=models) == [None, None]
    assert compbench_3in1.mean([0.5, None]) is None
    assert compbench_3in1.mean([0.5, 0.0, 1.0]) == 0.5


def test_pictures_keep_their_texts_across_batches(models, folder):
    images, texts = pictures(5), ["a cat", "a dog and a bee", "the sea", "x", "a long, long road"]
    images[3] = None
    values = compbench_3in1.similarities(models, images, texts)
    expected = [None if i is None else cosine(folder, i, text) for i, text in zip(images, texts, strict=True)]
    assert values == [None if one is None else pytest.approx(one, abs=1e-5) for one in expected]
    assert len({round(one, 3) for one in expected if one is not None}) == 4


def test_errors_come_before_models(models, tmp_path):
    with pytest.raises(ValueError, match="value='best'; write one of published, corrected, graded"):
        compbench_3in1.reward([SPATIAL], [frame()], value="best", models=models)
    absent = Models(spatial=models.spatial, clip=str(tmp_path / "absent"), device="cpu")
    with pytest.raises(FileNotFoundError, match=r"hf download openai/clip-vit-base-patch32 .*COMPBENCH_CLIP=DIR"):
        compbench_3in1.reward([ACTION], [frame()], models=absent)


def test_label_names_the_detector(models):
    assert compbench_3in1.label(models) == "3-in-1 (2D-spatial (detector=by hand))"
