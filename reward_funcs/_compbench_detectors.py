"""Detectors behind one narrow call, for rewards that need boxes only.

    find(images, nouns) -> for each image [{"class": noun, "box": (x0, y0, x1, y1) in pixels, "score": 0 to 1}, ...]

The family follows from the model's config: OWLv2 finds any noun; a COCO detector finds its 80 classes. The benchmark's
own detector, UniDet, runs in detectron2 only: label results with the detector that made them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reward_funcs import _geneval_detector
from reward_funcs._compbench_geometry import suppress
from reward_funcs._compbench_words import SYNONYMS
from reward_funcs._weights import found, pretrained
from reward_funcs.runtime import batches_of_one_size

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

DETECTOR = "google/owlv2-base-patch16-ensemble"
QUERY = "a photo of a {}"  # OWL-ViT, appendix: the prompt of its zero-shot evaluation
SUPPRESSION = 0.5  # detectron2's default ROI_HEADS.NMS_THRESH_TEST, which UniDet keeps; OWLv2 repeats its boxes
OPEN = "owlv2"
COCO = ("mask2former", *_geneval_detector.BOX_PROCESSORS)
# Least scores. OWLv2: transformers' default of post_process_object_detection. COCO: UniDet's (experts/model_bank.py).
OPEN_THRESHOLD, COCO_THRESHOLD = 0.1, 0.5


@dataclass(frozen=True, eq=False)
class BoxDetector:
    """What finds objects. classes: the names it knows, None for any noun.

    find(images, nouns): nouns, one list an image, are among the classes; boxes come in any order.
    """

    label: str
    classes: frozenset[str] | None
    find: Callable[[Sequence[Image], Sequence[Sequence[str]]], list[list[dict[str, Any]]]]

    def class_of(self, noun: str) -> str | None:
        """The detector's name of a noun; None where it has none."""
        if self.classes is None or noun in self.classes:
            return noun
        other = SYNONYMS.get(noun)
        return other if other in self.classes else None


@functools.cache
def load_detector(model_id: str, threshold: float | None, device: str) -> BoxDetector:
    """Load once a process. threshold: least score of a box; None is the family's default."""
    from transformers import AutoConfig

    with found("the detector of boxes", model_id, DETECTOR, "COMPBENCH_DETECTOR"):
        family = AutoConfig.from_pretrained(model_id).model_type
        if family != OPEN and family not in COCO:
            raise ValueError(
                f"the detector {model_id!r} is of the family {family!r}; use one of {', '.join((OPEN, *COCO))}, "
                "or pass a BoxDetector of your own"
            )
        logger.info("boxes come from %s (%s) on %s", model_id, family, device)
        if family == OPEN:
            return open_detector(model_id, OPEN_THRESHOLD if threshold is None else threshold, device)
        return coco_detector(model_id, COCO_THRESHOLD if threshold is None else threshold, device)


def coco_detector(model_id: str, threshold: float, device: str) -> BoxDetector:
    """A detector of GenEval's, its masks left aside."""
    detector = _geneval_detector.load_detector(model_id, device)

    def find(images: Sequence[Image], nouns: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
        boxes: list[list[dict[str, Any]]] = [[] for _ in images]
        for batch in batches_of_one_size(images, 8):
            instances = _geneval_detector.detect(detector, [images[i] for i in batch], threshold)
            for index, objects in zip(batch, instances, strict=True):
                boxes[index] = [
                    {"class": thing.name, "box": thing.box, "score": thing.score}
                    for thing in objects
                    if thing.name in nouns[index]
                ]
        return boxes

    return BoxDetector(model_id, frozenset(_geneval_detector.CLASSES), find)


def open_detector(model_id: str, threshold: float, device: str, batch_size: int = 8) -> BoxDetector:
    """OWLv2: every box takes the best of its image's nouns, and repeated boxes of a noun are suppressed."""
    import torch
    from transformers import AutoTokenizer, Owlv2ForObjectDetection, Owlv2ImageProcessorPil

    model = pretrained(Owlv2ForObjectDetection, model_id).to(device)
    processor = Owlv2ImageProcessorPil.from_pretrained(model_id)
    tokenizer = AutoTokenizer.from_pretrained(model_id)
    length = model.config.text_config.max_position_embeddings

    def find(images: Sequence[Image], nouns: Sequence[Sequence[str]]) -> list[list[dict[str, Any]]]:
        answers: list[list[dict[str, Any]]] = []
        for start in range(0, len(images), batch_size):
            some, asked = images[start : start + batch_size], nouns[start : start + batch_size]
            # All nouns of the batch are queried at once; each image then reads its own columns, so that no other
            # image's noun can take a box from it.
            queries = sorted({noun for each in asked for noun in each})
            if not queries:
                answers += [[] for _ in some]
                continue
            texts = [QUERY.format(noun) for noun in queries] * len(some)
            tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            pixels = processor([image.convert("RGB") for image in some], return_tensors="pt")
            with torch.inference_mode():
                outputs = model(
                    input_ids=tokens.input_ids.to(device),
                    attention_mask=tokens.attention_mask.to(device),
                    pixel_values=pixels.pixel_values.to(device),
                )
            for image, wanted, logits, boxes in zip(some, asked, outputs.logits, outputs.pred_boxes, strict=True):
                columns = [queries.index(noun) for noun in wanted]
                # Pictures are padded to a square, at the right and below, so boxes are shares of the long side.
                answers.append(named_boxes(logits[:, columns], boxes * max(image.size), wanted, threshold))
        return answers

    return BoxDetector(model_id, None, find)


def named_boxes(logits: Tensor, boxes: Tensor, nouns: Sequence[str], threshold: float) -> list[dict[str, Any]]:
    """Boxes with a score over `threshold`. logits (queries, nouns); boxes (queries, 4): centre, width, height."""
    if not nouns:
        return []
    scores, columns = logits.float().sigmoid().max(dim=1)
    named = []
    for score, column, (x, y, width, height) in zip(scores.tolist(), columns.tolist(), boxes.tolist(), strict=True):
        if score > threshold:
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            named.append({"class": nouns[column], "box": box, "score": score})
    return [dict(kept) for kept in suppress(named, SUPPRESSION)]
