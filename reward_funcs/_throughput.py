"""Images a second and memory of each reward: the published architecture with random weights, float32.

    python -m reward_funcs._throughput pickscore --batch 1 16

writes one row of Markdown a batch size: reward, models, parameters, batch, images a second, CPU seconds an image (of
all threads; other work on the machine stretches them less), peak memory. Speed does not depend on the weights' values,
so nothing is downloaded. Pictures are noise of 384 x 384, Janus-Pro's size; preparing them counts. Prompts have ten
words. GenEval looks at the colour of one object a picture.
"""

from __future__ import annotations

import argparse
import itertools
import resource
import string
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_funcs import (
    _clip,
    _geneval_color,
    _geneval_detector,
    _open_clip,
    aesthetic,
    aesthetic_v25,
    imagereward,
    ocr,
    shapes,
)
from reward_funcs import hpsv2 as hpsv2_reward
from reward_funcs.runtime import reward_device

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 384
PROMPT = " ".join(string.ascii_lowercase[:10])
# Published config.json of openai/clip-vit-large-patch14 and of google/siglip-so400m-patch14-384.
VIT_L_14: dict[str, Any] = {
    "projection_dim": 768,
    "text_config": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    },
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
    },
}
SO400M: dict[str, Any] = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


@dataclass(frozen=True, eq=False)
class Subject:
    """A reward to time: its models in words, their modules, and what scores one batch."""

    models: str
    modules: Sequence[Any]
    score: Callable[[list[Image], list[str]], Any]


def hpsv2(device: str) -> Subject:
    """HPSv2: CLIP ViT-H/14, the tensor resize."""
    model, tokenizer = clip(_open_clip.VIT_H_14, device), clip_tokenizer()
    pixels = hpsv2_reward.pixel_values
    return Subject(
        "CLIP ViT-H/14",
        [model],
        lambda images, texts: _clip.cosines(model, tokenizer, images, texts, len(images), pixels),
    )


def pickscore(device: str) -> Subject:
    """PickScore: CLIP ViT-H/14."""
    return cosine("CLIP ViT-H/14", _open_clip.VIT_H_14, device)


def clipscore(device: str) -> Subject:
    """CLIPScore: CLIP ViT-L/14."""
    return cosine("CLIP ViT-L/14", VIT_L_14, device)


def cosine(models: str, config: dict[str, Any], device: str) -> Subject:
    """A cosine under a CLIP of this config."""
    model, tokenizer = clip(config, device), clip_tokenizer()
    return Subject(models, [model], lambda images, texts: _clip.cosines(model, tokenizer, images, texts, len(images)))


def aesthetic_v1(device: str) -> Subject:
    """LAION's aesthetic score: CLIP ViT-L/14, of which the text tower rests."""
    model, head = clip(VIT_L_14, device), linear_head(768, device)
    return Subject(
        "CLIP ViT-L/14, head",
        [model, head],
        lambda images, texts: aesthetic.ratings(head, _clip.image_features(model, images)).tolist(),
    )


def aesthetic_v2_5(device: str) -> Subject:
    """Aesthetic v2.5: SigLIP so400m."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    model = SiglipVisionModel(SiglipVisionConfig(**SO400M)).eval().to(device)
    head = linear_head(1152, device)
    return Subject(
        "SigLIP so400m/14-384, head",
        [model, head],
        lambda images, texts: aesthetic.ratings(head, aesthetic_v25.image_features(model, images)).tolist(),
    )


def image_reward(device: str) -> Subject:
    """ImageReward: BLIP's large ViT, BERT base with cross-attention."""
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    vision = BlipVisionModel(BlipVisionConfig(**imagereward.LARGE["vision"])).eval().to(device)
    text = BlipTextModel(BlipTextConfig(**imagereward.LARGE["text"]), add_pooling_layer=False).eval().to(device)
    model = imagereward.Model(vision, text, linear_head(768, device))
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *string.ascii_lowercase]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(words)})
    return Subject(
        "BLIP ViT-L/16, BERT base, head",
        [vision, text, model.head],
        lambda images, texts: imagereward.ratings(model, tokenizer, images, texts),
    )


def geneval(device: str) -> Subject:
    """GenEval (HF Mask2Former): the detector, then the colour of one object a picture by CLIP ViT-L/14."""
    from transformers import (
        CLIPImageProcessorPil,
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessorPil,
    )

    # The library's default config is the published one but for the classes: Swin-S, 100 queries.
    classes: dict[str, Any] = {"num_labels": len(_geneval_detector.CLASSES)}
    mask2former = Mask2FormerForUniversalSegmentation(Mask2FormerConfig(**classes))
    mask2former = mask2former.eval().to(device)
    detector = _geneval_detector.Detector(
        mask2former, Mask2FormerImageProcessorPil(), _geneval_detector.CLASSES, device
    )
    model = clip(VIT_L_14, device)
    classifier = _geneval_color.ColorClassifier(model, clip_tokenizer(), CLIPImageProcessorPil(), device)

    def score(images: list[Image], texts: list[str]) -> None:
        _geneval_detector.detect(detector, images, floor=0.3)
        for image in images:
            _geneval_color.classify_colors(classifier, [image], "cat")

    return Subject("Mask2Former Swin-S, CLIP ViT-L/14", [mask2former, model], score)


def ocr_small(device: str) -> Subject:
    """OCR with the models inside rapidocr, on the CPU; noise has no word, so one is written on each picture."""

    from PIL import ImageDraw

    def score(images: list[Image], texts: list[str]) -> None:
        for image in images:
            ImageDraw.Draw(image).rectangle((40, 150, 344, 234), fill="white")
            ImageDraw.Draw(image).text((60, 165), "OPEN", fill="black", font_size=48)
        ocr.flow_grpo(['a sign "OPEN"'] * len(images), images)

    return Subject("PP-OCRv6 small (ONNX)", [], score)


def shapes_judge(device: str) -> Subject:
    """The verdict on the shapes world: no model."""
    asked = '{"tag": "single_object", "include": [{"class": "circle", "count": 1}]}'

    def score(images: list[Image], texts: list[str]) -> None:
        shapes.reward(texts, [image.resize((36, 36)) for image in images], [asked] * len(images))

    return Subject("none, 36 pixels", [], score)


SUBJECTS: dict[str, Callable[[str], Subject]] = {
    "aesthetic": aesthetic_v1,
    "aesthetic_v25": aesthetic_v2_5,
    "clipscore": clipscore,
    "geneval": geneval,
    "hpsv2": hpsv2,
    "imagereward": image_reward,
    "ocr": ocr_small,
    "pickscore": pickscore,
    "shapes": shapes_judge,
}


def clip(config: dict[str, Any], device: str) -> Any:
    """A CLIPModel of this config with random weights."""
    from transformers import CLIPConfig, CLIPModel

    return CLIPModel(CLIPConfig(**config)).eval().to(device)


def clip_tokenizer() -> Any:
    """A tokenizer of single letters, with CLIP's ids for start and end."""
    from transformers import CLIPTokenizer

    letters = {f"{letter}</w>": index for index, letter in enumerate(string.ascii_lowercase)}
    return CLIPTokenizer(vocab=letters | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}, merges=[])


def linear_head(features: int, device: str) -> Any:
    """A random head of the published widths."""
    from torch import nn

    widths = [features, 1024, 128, 64, 16, 1]
    layers = [nn.Linear(wide, narrow) for wide, narrow in itertools.pairwise(widths)]
    return nn.Sequential(*layers).eval().to(device)


def timed(subject: Subject, batch: int, seconds: float) -> tuple[float, float]:
    """Images a second and CPU seconds an image, over whole batches until `seconds` have passed.

    One image goes before and does not count.
    """
    from PIL.Image import fromarray

    noise = np.random.default_rng(0).integers(0, 256, (batch, SIDE, SIDE, 3), dtype=np.uint8)
    images, texts = [fromarray(pixels) for pixels in noise], [PROMPT] * batch
    subject.score(images[:1], texts[:1])
    start, cpu, scored = time.perf_counter(), time.process_time(), 0
    while scored == 0 or time.perf_counter() - start < seconds:
        subject.score(images, texts)
        scored += batch
    return scored / (time.perf_counter() - start), (time.process_time() - cpu) / scored


def peak_gib(device: str) -> float:
    """Largest memory so far in GiB: of the device, or of the process on a CPU."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(arguments: Sequence[str] | None = None) -> None:
    """Time one reward at each batch size, the smallest first so that its peak is its own."""
    parser = argparse.ArgumentParser(
        prog="python -m reward_funcs._throughput", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("name", choices=sorted(SUBJECTS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--seconds", type=float, default=10.0, help="time of each batch size at least")
    parser.add_argument("--device", default="auto")
    given = parser.parse_args(arguments)
    device = reward_device(given.device)
    subject = SUBJECTS[given.name](device)
    millions = sum(parameter.numel() for module in subject.modules for parameter in module.parameters()) / 1e6
    for batch in sorted(given.batch):
        speed, cpu = timed(subject, batch, given.seconds)
        measured = f"{batch} | {speed:.2g} | {cpu:.2g} | {peak_gib(device):.1f}"
        sys.stdout.write(f"| `{given.name}` | {subject.models} | {millions:.0f} M | {measured} |\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
