"""Logits to instances as GenEval's evaluator does it, on logits a reader can redo."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import Mask2FormerImageProcessorPil

from reward_funcs import _geneval_detector as detector


def test_one_query_may_appear_under_two_classes():
    # Probabilities (cat, dog, no object): query 0 .7 .2 .1, query 1 .1 .05 .85.
    logits = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.05, 0.85]]).log()
    probabilities, queries, labels = detector.best_classes(logits, floor=0.08)
    assert_close(probabilities, torch.tensor([0.7, 0.2, 0.1]), rtol=0, atol=1e-6)
    assert (queries, labels) == ([0, 0, 1], [0, 1, 0])


def test_at_most_100_pairs_of_query_and_class():
    probabilities, queries, _ = detector.best_classes(torch.zeros(70, 3), floor=0.0)  # 140 pairs of 1/3
    assert len(queries) == 100
    assert_close(probabilities, torch.full((100,), 1 / 3), rtol=0, atol=1e-6)


def test_score_box_and_mask_of_an_instance():
    # Two pixels on the object, (x, y) = (2, 1) and (1, 2), with probabilities 3/4 and 9/10: mean 0.825.
    # A logit of exactly 0 (probability 1/2) is off.
    logits = torch.full((3, 4), -1.0)
    logits[0, 0] = 0.0
    logits[1, 2] = math.log(3)
    logits[2, 1] = math.log(9)
    (found,) = detector.instances(torch.tensor([0.8]), ["cat"], logits[None])
    assert found.name == "cat"
    assert found.score == pytest.approx(0.8 * 0.825, rel=0, abs=1e-5)  # the area has 1e-6 added
    assert found.box == (1.0, 1.0, 3.0, 3.0)
    assert found.mask.tolist() == [[False] * 4, [False, False, True, False], [False, True, False, False]]


def test_empty_masks_and_low_scores_are_left_out():
    masks = torch.full((3, 2, 2), 20.0)  # probability 1
    masks[1] = -1.0
    probabilities, names = torch.tensor([0.9, 0.8, 0.2]), ["cat", "dog", "cow"]
    assert [found.name for found in detector.instances(probabilities, names, masks, floor=0.3)] == ["cat"]
    assert [found.name for found in detector.instances(probabilities, names, masks, floor=0.0)] == ["cat", "cow"]


def test_padding_is_cut_before_masks_return_to_image_size():
    # Bilinear 0, 4 -> 0, 1, 3, 4 at the padded width of 4. The picture fills 2 of it: 0, 1 -> 0, 1/4, 3/4, 1.
    logits = torch.tensor([[[0.0, 4.0]]])
    masks = detector.masks_at_image_size(logits, padded=(1, 4), resized=(1, 2), image=(1, 4))
    assert_close(masks, torch.tensor([[[0.0, 0.25, 0.75, 1.0]]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "resized"),
    [
        ((384, 384), (800, 800)),
        ((400, 600), (800, 1200)),
        ((400, 1333), (400, 1333)),  # the long side stops it
        ((1600, 1600), (800, 800)),
    ],
)
def test_resized_size_is_the_benchmarks(size, resized):
    assert detector.resized_size(*size) == resized


def test_picture_is_padded_not_stretched(monkeypatch):
    # 60 x 30 with a short side of 20: 40 x 20, padded to 64 x 32 after normalising, so with zeros.
    monkeypatch.setattr(detector, "SHORT_SIDE", 20)
    given = {}

    def model(pixel_values, pixel_mask):
        given.update(pixels=pixel_values, mask=pixel_mask)
        nothing = torch.full((1, 1, 3), -20.0).index_fill(-1, torch.tensor([2]), 20.0)
        return SimpleNamespace(class_queries_logits=nothing, masks_queries_logits=torch.zeros(1, 1, 8, 16))

    seer = detector.Detector(model, Mask2FormerImageProcessorPil(), ("cat", "dog"), "cpu")
    assert detector.detect(seer, [Image.new("RGB", (60, 30), "white")], floor=0.3) == [[]]
    assert given["pixels"].shape == (1, 3, 32, 64)
    white = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])  # ImageNet, RGB
    assert_close(given["pixels"][0, :, :20, :40], white[:, None, None].expand(3, 20, 40), rtol=0, atol=1e-5)
    assert given["pixels"][0, :, 20:].abs().sum() == given["pixels"][0, :, :, 40:].abs().sum() == 0
    assert given["mask"].sum() == 20 * 40


def test_far_edge_of_a_box_is_one_past_the_last_pixel():
    mask = np.zeros((4, 6), dtype=bool)
    mask[3, 5] = True
    assert detector.tight_box(mask) == (5.0, 3.0, 6.0, 4.0)


def labels_with(**changes):
    return dict(enumerate(changes.get(name.replace(" ", "_"), name) for name in detector.CLASSES))


def test_labels_are_matched_by_name_and_spelling():
    coco = {
        "computer_mouse": "mouse",
        "tv_remote": "remote",
        "computer_keyboard": "keyboard",
        "motorcycle": "motorbike",
        "airplane": "aeroplane",
        "couch": "sofa",
        "potted_plant": "pottedplant",
        "dining_table": "diningtable",
        "tv": "tvmonitor",
    }
    assert detector.geneval_names(labels_with(**coco)) == detector.CLASSES
    backwards = dict(enumerate(reversed(detector.CLASSES)))
    assert detector.geneval_names(backwards) == detector.CLASSES[::-1]
    assert detector.geneval_names({i: f"LABEL_{i}" for i in range(80)}) == detector.CLASSES


def test_labels_that_are_not_coco_are_an_error():
    with pytest.raises(ValueError, match="has 2 classes, GenEval needs COCO's 80"):
        detector.geneval_names({0: "cat", 1: "dog"})
    with pytest.raises(ValueError, match="'unicorn' is not a COCO class"):
        detector.geneval_names(labels_with(horse="unicorn"))
