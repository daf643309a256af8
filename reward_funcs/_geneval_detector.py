"""Objects in a picture: boxes, scores and, by Mask2Former, masks as GenEval's evaluator finds them.

The library's own `post_process_instance_segmentation` is another rule: it resizes masks to 384 x 384 with the padding
still on, so boxes are coarse and shifted. Here, as in mmdet 2.28 (`MaskFormerFusionHead.instance_postprocess`):

    p = softmax over classes, "no object" dropped;  the 100 best of query x class;
    mask = logit > 0 at image size;  score = p * mean sigmoid(logit) inside the mask;  box = tight, [x0, y0, x1+1, y1+1]

Resizing is PIL's bilinear. mmdet's (OpenCV) does not smooth when it shrinks, which matters for images larger than
1333 x 800 only.

A detector of boxes alone (RT-DETR, RT-DETRv2, D-FINE, DETR) may stand in: lighter, not the benchmark's. Its scores lie
elsewhere, so its thresholds need setting; colours are read from the whole box, as GenEval does where there is no mask.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_funcs.runtime import whole_weights

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

logger = logging.getLogger(__name__)

# COCO's 80 classes in COCO's order, as GenEval spells them (evaluation/object_names.txt).
# fmt: off
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow", "elephant",
    "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee", "skis", "snowboard",
    "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard", "tennis racket", "bottle",
    "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich", "orange", "broccoli",
    "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed", "dining table", "toilet",
    "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone", "microwave", "oven", "toaster",
    "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear", "hair drier", "toothbrush",
)
# fmt: on
# Other spellings in COCO label files, blanks removed.
ALIASES = {
    "mouse": "computer mouse",
    "remote": "tv remote",
    "keyboard": "computer keyboard",
    "motorbike": "motorcycle",
    "aeroplane": "airplane",
    "sofa": "couch",
    "tvmonitor": "tv",
    "hairdryer": "hair drier",
    "doughnut": "donut",
}
SHORT_SIDE, LONG_SIDE, PAD_MULTIPLE = 800, 1333, 32  # test pipeline of mask2former_swin-s-p4-w7-224_lsj_8x2_50e_coco
MAX_INSTANCES = 100  # same config, test_cfg.max_per_image
NO_CLASS = "N/A"  # DETR's classes are numbered with COCO's gaps
# Image processors of the detectors of boxes, by model type. Each also turns the model's answer into boxes.
BOX_PROCESSORS = {
    "rt_detr": "RTDetrImageProcessorPil",
    "rt_detr_v2": "RTDetrImageProcessorPil",
    "d_fine": "RTDetrImageProcessorPil",
    "detr": "DetrImageProcessorPil",
}
EMPTY_MASK = 1e-6  # instance_postprocess: added to the mask area before dividing


@dataclass(frozen=True)
class Instance:
    """One object found. box: (x0, y0, x1, y1) in pixels; mask: (height, width), True on the object, or None."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Detector:
    """A loaded model, its image processor and the GenEval name of each of its classes. masks: whether it gives any."""

    model: Any
    processor: Any
    names: tuple[str, ...]
    device: str
    masks: bool = True


@functools.cache
def load_detector(model_id: str, device: str) -> Detector:
    """Load once a process: Mask2Former, or a detector of boxes, by what the checkpoint's configuration says."""
    import torch
    import transformers

    try:
        kind = transformers.AutoConfig.from_pretrained(model_id).model_type
        if kind != "mask2former" and kind not in BOX_PROCESSORS:
            known = ", ".join(["mask2former", *BOX_PROCESSORS])
            raise ValueError(f"the GenEval detector {model_id!r} is a {kind}; give a model of type {known}")
        logger.info("GenEval (HF %s): loading the detector %s on %s", kind, model_id, device)
        processor: Any
        model: Any
        with whole_weights():
            if kind == "mask2former":
                model = transformers.Mask2FormerForUniversalSegmentation.from_pretrained(model_id, dtype=torch.float32)
                # Own settings: a checkpoint's file may resize differently from the benchmark's test pipeline.
                processor = transformers.Mask2FormerImageProcessorPil()
            else:
                model = transformers.AutoModelForObjectDetection.from_pretrained(model_id, dtype=torch.float32)
                processor = getattr(transformers, BOX_PROCESSORS[kind]).from_pretrained(model_id)
    except OSError as error:
        raise FileNotFoundError(
            f"the GenEval detector {model_id!r} is neither a local folder nor downloadable here: run "
            "`hf download facebook/mask2former-swin-small-coco-instance --local-dir DIR` where there is a network "
            "and set GENEVAL_DETECTOR=DIR"
        ) from error
    names = geneval_names(model.config.id2label)
    return Detector(model.to(device).eval(), processor, names, device, masks=kind == "mask2former")


def geneval_names(id2label: Mapping[int, str]) -> tuple[str, ...]:
    """GenEval's name of each class index. Labels are matched by name; unnamed ones (LABEL_3) by COCO's order."""
    labels = [id2label[index] for index in range(len(id2label))]
    count = len(labels) - labels.count(NO_CLASS)
    if count != len(CLASSES):
        raise ValueError(
            f"the detector has {count} classes, GenEval needs COCO's {len(CLASSES)}: "
            "use an instance model trained on COCO, e.g. facebook/mask2former-swin-small-coco-instance"
        )
    if all(label == f"LABEL_{index}" for index, label in id2label.items()):
        return CLASSES
    by_letters = {name.replace(" ", ""): name for name in CLASSES} | ALIASES | {"n/a": NO_CLASS}
    unknown = [label for label in labels if label.lower().replace(" ", "") not in by_letters]
    if unknown:
        raise ValueError(f"the detector's label {unknown[0]!r} is not a COCO class; correct its config.id2label")
    return tuple(by_letters[label.lower().replace(" ", "")] for label in labels)


def resized_size(height: int, width: int) -> tuple[int, int]:
    """Largest size of the same shape with its short side at most SHORT_SIDE and its long side at most LONG_SIDE."""
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def padded_size(height: int, width: int) -> tuple[int, int]:
    """The size rounded up to multiples of PAD_MULTIPLE."""
    return math.ceil(height / PAD_MULTIPLE) * PAD_MULTIPLE, math.ceil(width / PAD_MULTIPLE) * PAD_MULTIPLE


def detect(detector: Detector, images: Sequence[Image], floor: float) -> list[list[Instance]]:
    """All instances of each image with a score above `floor`. All images must have one size. Gradient: none."""
    return (detect_masks if detector.masks else detect_boxes)(detector, images, floor)


def detect_boxes(detector: Detector, images: Sequence[Image], floor: float) -> list[list[Instance]]:
    """`detect` by a detector of boxes, cut at the picture's edge. Gradient: none."""
    import torch

    width, height = images[0].size
    inputs = detector.processor([image.convert("RGB") for image in images], return_tensors="pt").to(detector.device)
    with torch.inference_mode():
        outputs = detector.model(**inputs)
    answers = detector.processor.post_process_object_detection(outputs, floor, [(height, width)] * len(images))
    found = []
    for answer in answers:
        edges = answer["boxes"].clamp(min=0).minimum(answer["boxes"].new_tensor([width, height, width, height]))
        rows = zip(answer["labels"].tolist(), answer["scores"].tolist(), edges.tolist(), strict=True)
        named = [Instance(detector.names[label], score, tuple(box), None) for label, score, box in rows]
        found.append([one for one in named if one.name != NO_CLASS])
    return found


def detect_masks(detector: Detector, images: Sequence[Image], floor: float) -> list[list[Instance]]:
    """`detect` by Mask2Former. Gradient: none."""
    import torch
    from torch.nn.functional import pad

    width, height = images[0].size
    resized = resized_size(height, width)
    padded = padded_size(*resized)
    # size_divisor=0: the processor would otherwise stretch to a multiple of 32 instead of padding to it.
    inputs = detector.processor(
        [image.convert("RGB") for image in images],
        size={"height": resized[0], "width": resized[1]},
        size_divisor=0,
        return_tensors="pt",
    ).to(detector.device)
    padding = (0, padded[1] - resized[1], 0, padded[0] - resized[0])  # right and bottom, with zeros
    found = []
    with torch.inference_mode():
        outputs = detector.model(**{name: pad(values, padding) for name, values in inputs.items()})
        for class_logits, mask_logits in zip(outputs.class_queries_logits, outputs.masks_queries_logits, strict=True):
            probabilities, queries, labels = best_classes(class_logits, floor)
            masks = masks_at_image_size(mask_logits[queries], padded, resized, (height, width))
            names = [detector.names[label] for label in labels]
            found.append(instances(probabilities, names, masks, floor))
    return found


def best_classes(class_logits: Tensor, floor: float) -> tuple[Tensor, list[int], list[int]]:
    """Probabilities, queries and classes of the MAX_INSTANCES best pairs, best first, those below `floor` left out.

    class_logits (queries, classes + 1), "no object" last. One query may appear under several classes.
    """
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    best = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()))
    # The score is the probability times a mask factor of at most 1, so what is below the floor here stays below it.
    indices = best.indices[best.values >= floor]
    queries, labels = indices // probabilities.shape[1], indices % probabilities.shape[1]
    return best.values[best.values >= floor], queries.tolist(), labels.tolist()


def masks_at_image_size(
    mask_logits: Tensor, padded: tuple[int, int], resized: tuple[int, int], image: tuple[int, int]
) -> Tensor:
    """Mask logits (objects, height, width) at the image's size: up to the padded size, padding cut off, then back."""
    from torch.nn.functional import interpolate

    at_padded = interpolate(mask_logits[:, None].float(), size=padded, mode="bilinear", align_corners=False)
    cut = at_padded[..., : resized[0], : resized[1]]
    return interpolate(cut, size=image, mode="bilinear", align_corners=False)[:, 0]


def instances(probabilities: Tensor, names: Sequence[str], mask_logits: Tensor, floor: float = 0.0) -> list[Instance]:
    """Instances of class probability, name and mask logits (objects, height, width) at image size.

    Empty masks and scores below `floor` are left out.
    """
    masks = mask_logits > 0
    inside = (mask_logits.sigmoid() * masks).sum(dim=(1, 2)) / (masks.sum(dim=(1, 2)) + EMPTY_MASK)
    scores = (probabilities * inside).tolist()
    found = []
    for name, score, mask in zip(names, scores, masks.cpu().numpy(), strict=True):
        if mask.any() and score >= floor:
            found.append(Instance(name, score, tight_box(mask), mask))
    return found


def tight_box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Smallest box around the True pixels, its far edges one past the last pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)
