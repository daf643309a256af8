"""Detectors behind one call: tiny random models saved to disk, whose boxes are computed by hand from their outputs."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPTokenizer,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2ImageProcessorPil,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
    SwinConfig,
)

from reward_funcs import _compbench_detectors as detectors
from reward_funcs import _geneval_detector, numeracy, spatial_2d
from reward_funcs.spatial_2d import Models

SIDE = 32


def tokenizer():
    """CLIP's, with letters for words; id 0 is kept free, since OWLv2 reads a query that begins with it as empty."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<free>", *letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


@pytest.fixture(scope="module")
def owl_folder(tmp_path_factory):
    torch.manual_seed(0)
    words = tokenizer()
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id, "pad_token_id": 0}
    config = Owlv2Config(
        text_config=size | ids | {"vocab_size": len(words), "max_position_embeddings": 40},
        vision_config=size | {"image_size": SIDE, "patch_size": 8},
        projection_dim=16,
    )
    model = Owlv2ForObjectDetection(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    path = tmp_path_factory.mktemp("owl")
    model.save_pretrained(path)
    Owlv2ImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(path)
    words.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def cat_folder(tmp_path_factory):
    """A random Mask2Former whose every query is sure to see a cat."""
    torch.manual_seed(0)
    sizes = {"embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4, "window_size": 4, "out_indices": [1, 2, 3, 4]}
    small = {"hidden_dim": 32, "feature_size": 32, "mask_feature_size": 32, "encoder_feedforward_dim": 16}
    layers = {"dim_feedforward": 16, "encoder_layers": 1, "decoder_layers": 2, "num_attention_heads": 2}
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(image_size=32, **sizes), num_labels=80, num_queries=4, **small, **layers
    )
    model = Mask2FormerForUniversalSegmentation(config)
    with torch.no_grad():
        model.class_predictor.bias[_geneval_detector.CLASSES.index("cat")] = 50.0
    path = tmp_path_factory.mktemp("mask2former")
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    """Mask2Former would enlarge every picture to 800."""
    monkeypatch.setattr(_geneval_detector, "SHORT_SIDE", 64)


def pictures(*sizes):
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)) for size in sizes]


def test_logits_become_named_boxes():
    # Sigmoid of ln 3 is 3/4, of ln 4 is 4/5, of 0 is 1/2. The third box lies on the second and is a worse dog.
    logits = torch.tensor([[3.0, 1.0], [1.0, 4.0], [0.5, 3.0], [0.1, 0.2]]).log()
    boxes = torch.tensor(
        [[50.0, 40.0, 20.0, 10.0], [10.0, 10.0, 4.0, 4.0], [10.0, 10.0, 4.0, 5.0], [1.0, 1.0, 1.0, 1.0]]
    )
    found = detectors.named_boxes(logits, boxes, ["cat", "dog"], threshold=0.5)
    assert [(box["class"], box["box"]) for box in found] == [("dog", (8, 8, 12, 12)), ("cat", (40, 35, 60, 45))]
    assert [box["score"] for box in found] == [pytest.approx(0.8), pytest.approx(0.75)]
    assert detectors.named_boxes(torch.tensor([[0.0]]), boxes[:1], ["cat"], threshold=0.5) == []  # not over it
    assert detectors.named_boxes(logits[:, :0], boxes, [], threshold=0.1) == []


def by_hand(folder, image, nouns, threshold):
    """Boxes of one picture and its own queries alone, by the library's own processing."""
    model, words = Owlv2ForObjectDetection.from_pretrained(folder).eval(), tokenizer()
    texts = [f"a photo of a {noun}" for noun in nouns]
    tokens = words(texts, padding="max_length", max_length=40, return_tensors="pt")
    processor = Owlv2ImageProcessorPil(size={"height": SIDE, "width": SIDE})
    with torch.no_grad():
        outputs = model(**tokens, pixel_values=processor(image, return_tensors="pt").pixel_values)
    (found,) = processor.post_process_object_detection(outputs, threshold, [image.size[::-1]])
    labels = [nouns[label] for label in found["labels"].tolist()]
    return nearly(in_order(zip(labels, found["scores"].tolist(), found["boxes"].tolist(), strict=True)))


def in_order(boxes):
    """(class, score, box) by class and place."""
    return sorted(boxes, key=lambda found: (found[0], [round(edge, 1) for edge in found[2]]))


def nearly(boxes):
    """The same as approximate numbers: a picture may be computed beside another."""
    return [(name, pytest.approx(score, abs=1e-5), pytest.approx(tuple(box), abs=1e-3)) for name, score, box in boxes]


def test_owl_finds_each_pictures_own_nouns_where_the_library_does(owl_folder, monkeypatch):
    monkeypatch.setattr(detectors, "SUPPRESSION", 1.0)  # the library suppresses nothing
    images = pictures((48, 32), (24, 60), (40, 40))
    nouns = [["cat", "dog"], ["airplane"], ["bee", "cat", "zebra"]]
    detector = detectors.open_detector(owl_folder, 0.3, "cpu", batch_size=2)
    found = detector.find(images, nouns)
    for image, asked, boxes in zip(images, nouns, found, strict=True):
        plain = in_order((box["class"], box["score"], box["box"]) for box in boxes)
        assert plain == by_hand(owl_folder, image, asked, 0.3)
        assert boxes, "a threshold that leaves no box tests nothing"
    assert detector.find(images[:1], [[]]) == [[]]
    assert detector.class_of("anything at all") == "anything at all"


def test_coco_detector_gives_only_the_nouns_asked(cat_folder):
    (image,) = pictures((64, 48))
    detector = detectors.load_detector(cat_folder, 0.0, "cpu")
    assert detector.classes == frozenset(_geneval_detector.CLASSES)
    plain = _geneval_detector.load_detector(cat_folder, "cpu")
    (instances,) = _geneval_detector.detect(plain, [image], 0.0)
    expected = [{"class": "cat", "box": one.box, "score": one.score} for one in instances if one.name == "cat"]
    assert expected
    assert detector.find([image], [["cat"]]) == [expected]
    assert detector.find([image, image], [["dog"], ["cat"]])[1] == expected


def test_a_coco_detector_without_masks(tmp_path):
    torch.manual_seed(0)
    stages = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "layer_type": "basic"}
    widths = {"d_model": 16, "encoder_hidden_dim": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 1, "decoder_layers": 2}
    config = RTDetrV2Config(
        backbone_config=RTDetrResNetConfig(**stages, out_features=["stage2", "stage3", "stage4"]),
        encoder_in_channels=[8, 16, 16],
        decoder_in_channels=[16, 16, 16],
        num_labels=80,
        num_queries=5,
        num_denoising=0,
        **widths,
        **heads,
    )
    model = RTDetrV2ForObjectDetection(config)
    cat = _geneval_detector.CLASSES.index("cat")
    for head in model.model.decoder.class_embed:  # every query sees a cat with a probability of 2 / (2 + 1)
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, -20.0)
        torch.nn.init.constant_(head.bias[cat : cat + 1], float(np.log(2)))
    model.save_pretrained(tmp_path)
    RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    (found,) = detectors.load_detector(str(tmp_path), None, "cpu").find(pictures((48, 32)), [["cat", "dog"]])
    assert [(box["class"], box["score"]) for box in found] == [("cat", pytest.approx(2 / 3, abs=1e-5))] * 5
    assert all(0 <= box["box"][0] <= box["box"][2] <= 48 for box in found)
    assert detectors.load_detector(str(tmp_path), 0.7, "cpu").find(pictures((48, 32)), [["cat"]]) == [[]]


def test_rewards_run_on_both_families(owl_folder, cat_folder):
    images = pictures((48, 48), (48, 48))
    prompts = ["a cat on the left of a bee", "two cats near a dog"]
    owl = Models(detector=owl_folder, threshold=0.3, device="cpu")
    boxes = detectors.load_detector(owl_folder, 0.3, "cpu").find(images[:1], [["bee", "cat"]])[0]
    verdict = spatial_2d.judge(boxes, spatial_2d.Relation("cat", "on the left of", "bee"), (48, 48))
    assert spatial_2d.reward(prompts[:1], images[:1], value="graded", models=owl) == [verdict.graded]
    assert verdict.graded > 0
    # COCO has cats and dogs but no bee.
    coco = Models(detector=cat_folder, threshold=0.0, device="cpu")
    assert spatial_2d.reward(prompts, images, value="graded", models=coco)[0] is None
    cats = detectors.load_detector(cat_folder, 0.0, "cpu").find(images[1:], [["cat"]])[0]
    assert numeracy.reward(["a cat"], images[1:], models=coco) == [numeracy.judge(cats, {"cat": 1}, (48, 48))]


def test_threshold_and_family_defaults(owl_folder, cat_folder, monkeypatch):
    seen = []
    for name in ("open_detector", "coco_detector"):
        monkeypatch.setattr(detectors, name, lambda model_id, threshold, device: seen.append(threshold))
    load = detectors.load_detector.__wrapped__
    load(owl_folder, None, "cpu")
    load(cat_folder, None, "cpu")
    load(owl_folder, 0.7, "cpu")
    assert seen == [0.1, 0.5, 0.7]


def test_a_detector_that_is_absent_or_of_another_family_says_what_to_do(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"hf download google/owlv2-base-patch16-ensemble .*COMPBENCH_DETECTOR=DIR"
    ):
        detectors.load_detector(str(tmp_path / "absent"), None, "cpu")
    SwinConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"of the family 'swin'; use one of owlv2, mask2former, rt_detr, .*or pass a BoxDetector"
    ):
        detectors.load_detector(str(tmp_path), None, "cpu")


def test_environment_names_the_detector(monkeypatch):
    monkeypatch.setenv("COMPBENCH_DETECTOR", "/weights/owl")
    assert Models().detector == "/weights/owl"
    assert spatial_2d.label() == "2D-spatial (detector=/weights/owl)"
