"""GenEval with detectors that give boxes without masks: tiny random models whose answers are known beforehand."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    DetrConfig,
    DetrForObjectDetection,
    DetrImageProcessorPil,
    DFineConfig,
    DFineForObjectDetection,
    HGNetV2Config,
    ResNetConfig,
    RTDetrImageProcessorPil,
    RTDetrResNetConfig,
    RTDetrV2Config,
    RTDetrV2ForObjectDetection,
)
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

from reward_funcs import _geneval_color as color
from reward_funcs import _geneval_detector as detector
from reward_funcs import geneval

CAT = detector.CLASSES.index("cat")
SMALL = {
    "num_labels": 80,
    "d_model": 16,
    "encoder_hidden_dim": 16,
    "encoder_layers": 1,
    "encoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_layers": 2,
    "decoder_ffn_dim": 16,
    "decoder_attention_heads": 2,
    "num_queries": 5,
    "num_denoising": 0,
    "decoder_in_channels": [16, 16, 16],
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 16, 16], "depths": [1, 1, 1, 1], "layer_type": "basic"}


def rt_detr_v2():
    backbone = RTDetrResNetConfig(**RESNET, out_features=["stage2", "stage3", "stage4"])
    config = RTDetrV2Config(backbone_config=backbone, encoder_in_channels=[8, 16, 16], **SMALL)
    model = RTDetrV2ForObjectDetection(config)
    return model, list(model.model.decoder.class_embed), RTDetrImageProcessorPil


def d_fine():
    backbone = HGNetV2Config(
        stem_channels=[3, 8, 8],
        hidden_sizes=[8, 16, 16, 16],
        stage_in_channels=[8, 8, 16, 16],
        stage_mid_channels=[8, 8, 8, 8],
        stage_out_channels=[8, 16, 16, 16],
        stage_num_blocks=[1, 1, 1, 1],
        out_features=["stage2", "stage3", "stage4"],
    )
    config = DFineConfig(backbone_config=backbone, encoder_in_channels=[16, 16, 16], **SMALL)
    model = DFineForObjectDetection(config)
    return model, list(model.model.decoder.class_embed), RTDetrImageProcessorPil


def detr():
    backbone = ResNetConfig(**RESNET, out_features=["stage4"])
    same = ("d_model", "encoder_layers", "encoder_ffn_dim", "encoder_attention_heads")
    same += ("decoder_layers", "decoder_ffn_dim", "decoder_attention_heads", "num_queries")
    labels = ["N/A", *detector.CLASSES, "N/A"]  # as COCO's numbers have gaps
    config = DetrConfig(
        backbone_config=backbone,
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        id2label=dict(enumerate(labels)),
        label2id={},
        **{name: SMALL[name] for name in same},
    )
    model = DetrForObjectDetection(config)
    return model, [model.class_labels_classifier], DetrImageProcessorPil


@pytest.fixture(scope="module", params=[rt_detr_v2, d_fine, detr], ids=lambda build: build.__name__)
def cat_detector(request, tmp_path_factory):
    """A folder with a model whose every query sees a cat with a probability of 2/3 and nothing else."""
    torch.manual_seed(0)
    model, heads, processor = request.param()
    for head in heads:
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, -20.0)
        with torch.no_grad():
            if len(head.bias) == 80:  # a sigmoid a class: 1 / (1 + 1/2)
                head.bias[CAT] = math.log(2)
            else:  # softmax over "N/A", 80 classes, "N/A", "no object": 2 / (2 + 1)
                head.bias[CAT + 1], head.bias[-1] = math.log(2), 0.0
    folder = tmp_path_factory.mktemp(request.param.__name__)
    model.save_pretrained(folder)
    processor(size={"height": 64, "width": 64}).save_pretrained(folder)
    return str(folder)


def pictures(count, size=(48, 32)):
    noise = np.random.default_rng(0).integers(0, 256, (count, size[1], size[0], 3), dtype=np.uint8)
    return [Image.fromarray(pixels) for pixels in noise]


def asks(name, tag="single_object", **more):
    return json.dumps({"tag": tag, "include": [{"class": name, "count": 1} | more]})


def test_boxes_are_in_pixels_of_the_picture(cat_detector):
    loaded = detector.load_detector(cat_detector, "cpu")
    assert not loaded.masks
    image = pictures(1)
    (found,) = detector.detect(loaded, image, floor=0.3)
    assert [one.name for one in found] == ["cat"] * 5
    assert [one.score for one in found] == pytest.approx([2 / 3] * 5, abs=1e-5)
    assert all(one.mask is None for one in found)
    # By hand from what the model says: centre and size as shares of the picture, cut at its edge.
    with torch.inference_mode():
        answer = loaded.model(**loaded.processor(image, return_tensors="pt"))
    centre, size = answer.pred_boxes[0, :, :2], answer.pred_boxes[0, :, 2:]
    edges = torch.cat([centre - size / 2, centre + size / 2], dim=1) * torch.tensor([48, 32, 48, 32])
    edges = edges.clamp(min=0).minimum(torch.tensor([48.0, 32, 48, 32]))
    assert np.array(sorted(one.box for one in found)) == pytest.approx(np.array(sorted(edges.tolist())), abs=1e-3)


def test_boxes_end_at_the_edge_of_the_picture():
    # Centre and size as shares: (0 +- .25) * 40 and (1 +- .5) * 20.
    answer = DetrObjectDetectionOutput(
        logits=torch.tensor([[[-9.0, 9.0]]]), pred_boxes=torch.tensor([[[0.0, 1.0, 0.5, 1.0]]])
    )
    seer = detector.Detector(lambda **inputs: answer, RTDetrImageProcessorPil(), ("cat", "dog"), "cpu", masks=False)
    ((one,),) = detector.detect(seer, [Image.new("RGB", (40, 20))], floor=0.3)
    assert (one.name, one.box) == ("dog", (0.0, 10.0, 10.0, 20.0))


def test_floor_is_the_threshold(cat_detector):
    loaded = detector.load_detector(cat_detector, "cpu")
    assert detector.detect(loaded, pictures(1), floor=0.67) == [[]]


def test_rewards_and_their_thresholds(cat_detector, monkeypatch):
    models = geneval.Models(detector=cat_detector, device="cpu", batch_size=2)
    images = [*pictures(2), None, *pictures(1, size=(32, 32))]
    asked = [asks("cat"), asks("dog"), asks("cat"), asks("cat")]
    assert geneval.reward(["p"] * 4, images, asked, models=models) == [1.0, 0.0, None, 1.0]
    assert geneval.strict(["p"] * 4, images, asked, models=models) == [0.0, 0.0, None, 0.0]  # five cats, not one
    assert geneval.score(["p"] * 4, images, asked, models=models) == [-3.0, 0.0, None, -3.0]  # 1 - 4 / 1
    # 2/3 is below the .9 of counting, unless the detector's own threshold says otherwise.
    counted = [asks("cat", "counting")]
    assert geneval.reward(["p"], images[:1], counted, models=models) == [0.0]
    monkeypatch.setenv("GENEVAL_COUNTING_THRESHOLD", "0.4")
    lower = geneval.Models(detector=cat_detector, device="cpu")
    assert geneval.reward(["p"], images[:1], counted, models=lower) == [1.0]
    monkeypatch.setenv("GENEVAL_THRESHOLD", "0.95")
    higher = geneval.Models(detector=cat_detector, device="cpu")
    assert geneval.reward(["p"], images[:1], asked[:1], models=higher) == [0.0]
    (verdict,) = geneval.judge_images(images[:1], asked[:1], higher, threshold=0.3)  # the caller has the last word
    assert verdict.correct


def test_color_is_read_from_the_whole_box(cat_detector, monkeypatch):
    crops = []

    def all_red(classifier, given, name):
        crops.extend(given)
        return ["red"] * len(given)

    monkeypatch.setattr(geneval, "classify_colors", all_red)
    monkeypatch.setattr(geneval, "load_color_classifier", lambda model_id, device: None)
    models = geneval.Models(detector=cat_detector, device="cpu")
    image = pictures(1)
    assert geneval.reward(["p"], image, [asks("cat", "colors", color="red")], models=models) == [1.0]
    (crop,) = crops
    left, top, right, bottom, _ = geneval.judge_images(image, [asks("cat")], models)[0].kept["cat"][0]
    whole = (int(left), int(top), math.ceil(right), math.ceil(bottom))
    assert np.array_equal(np.asarray(crop), np.asarray(image[0].crop(whole)))


def test_box_thinner_than_a_pixel_still_has_a_color():
    picture = Image.new("RGB", (4, 4), "blue")
    crop = color.object_on_grey(picture, None, (1.6, 2.0, 1.9, 2.0))
    assert (crop.size, crop.getpixel((0, 0))) == ((1, 1), (0, 0, 255))


def test_model_that_is_no_detector_is_named(tmp_path):
    CLIPConfig().save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="is a clip; give a model of type mask2former, rt_detr, rt_detr_v2, d_fine, detr"
    ):
        detector.load_detector(str(tmp_path), "cpu")
