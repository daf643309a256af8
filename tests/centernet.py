"""A COCO detector with real weights, small enough for tests: MobileNetV3-CenterNet as a TensorFlow.js graph, in torch.

The graph (4 MB, half precision) comes inside the npm package @vladmandic/human; tests/fetch_weights.py fetches it. It
gives two maps at a quarter of 512 x 512: how likely the centre of an object of each class is here, and how far its box
reaches to the left, top, right and bottom. A peak of the first map with the second map's reach is a detection.
"""

import base64
import functools
import json
import math

import numpy as np
import torch
from fetch_weights import weights_file
from torch import nn

from reward_funcs._geneval_detector import CLASSES  # the graph numbers the classes in COCO's order

SIDE, STRIDE, MOST = 512, 4, 100


def detect(image):
    """Objects in a PIL image as GenEval's rule reads them, most confident first; at most 100."""
    graph = load_graph()
    pixels = np.asarray(image.convert("RGB").resize((SIDE, SIDE), 2), dtype=np.float32)
    with torch.inference_mode():
        heat, reach = graph(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    heat, reach = heat[0], reach[0]
    peaks = heat * (nn.functional.max_pool2d(heat[None], 3, 1, 1)[0] == heat)
    scores, places = peaks.flatten().topk(MOST)
    found = []
    for score, place in zip(scores.tolist(), places.tolist(), strict=True):
        label, row, column = np.unravel_index(place, heat.shape)
        left, top, right, bottom = reach[:, row, column].tolist()
        x, y = column * STRIDE, row * STRIDE
        box = np.array([x - left, y - top, x + right, y + bottom]) / SIDE * np.tile(image.size, 2)
        found.append({"class": CLASSES[label], "box": tuple(map(float, box)), "score": score})
    return found


@functools.cache
def load_graph():
    """The graph, loaded once a process."""
    model = json.loads(weights_file("centernet.json").read_text())
    constants = read_weights(model["weightsManifest"], weights_file("centernet.bin").read_bytes())
    nodes = {node["name"]: node for node in model["modelTopology"]["node"]}

    def run(pixels):
        known = {"tower_0/images": pixels}
        return [value_of(name, nodes, constants, known) for name in ("tower_0/keypoints", "tower_0/wh")]

    return run


def read_weights(manifest, data):
    """Tensors by name: float16 or int32, one after the other."""
    tensors, start = {}, 0
    for weight in (weight for group in manifest for weight in group["weights"]):
        kind = np.dtype(weight.get("quantization", weight)["dtype"]).newbyteorder("<")
        count = math.prod(weight["shape"])
        numbers = np.frombuffer(data, kind, count, start).reshape(weight["shape"])
        tensors[weight["name"]] = torch.from_numpy(numbers.astype(np.float32 if kind.kind == "f" else np.int64))
        start += count * kind.itemsize
    if start != len(data):
        raise ValueError(f"the weights have {len(data)} bytes, the manifest describes {start}")
    return tensors


def value_of(name, nodes, constants, known):
    """Value of a node; inputs first. Feature maps are (batch, channels, height, width), TensorFlow's channels last."""
    if name in constants:
        return constants[name]
    if name not in known:
        node = nodes[name]
        inputs = [value_of(source, nodes, constants, known) for source in node["input"]]
        known[name] = OPERATIONS[node["op"]](node["attr"], *inputs)
    return known[name]


def convolution(attributes, pixels, weight, bias=None, depthwise=False):
    """TensorFlow's convolution. Its SAME padding puts the odd one to the right and bottom; 1 x 1 kernels need none."""
    same = base64.b64decode(attributes["padding"]["s"]) == b"SAME"
    if not same and weight.shape[:2] != (1, 1):
        raise ValueError(
            f"padding {attributes['padding']} of a {tuple(weight.shape)} kernel; this graph has SAME alone"
        )
    weight = weight.permute(2, 3, 0, 1) if depthwise else weight.permute(3, 2, 0, 1)
    stride = int(attributes["strides"]["list"]["i"][1])
    sides = zip(pixels.shape[2:], weight.shape[2:], strict=True)
    missing = [max((math.ceil(side / stride) - 1) * stride + kernel - side, 0) for side, kernel in sides]
    (above, below), (before, after) = ((n // 2, n - n // 2) for n in missing)
    padded = nn.functional.pad(pixels, (before, after, above, below))
    groups = pixels.shape[1] if depthwise else 1
    found = nn.functional.conv2d(padded, weight, bias, stride, groups=groups)
    fused = attributes.get("fused_ops", {}).get("list", {}).get("s", [])
    return found.relu() if any(base64.b64decode(name) == b"Relu" for name in fused) else found


def depthwise(attributes, pixels, weight, bias=None):
    return convolution(attributes, pixels, weight, bias, depthwise=True)


def twice_as_large(attributes, pixels, size):
    """TensorFlow's old bilinear resize by 2: even positions keep their value, odd ones are between their neighbours."""
    if size.tolist() != [2 * n for n in pixels.shape[2:]]:
        raise ValueError(
            f"resize of {tuple(pixels.shape[2:])} to {size.tolist()}; this graph is written with twice alone"
        )
    for axis in (2, 3):
        last = pixels.shape[axis] - 1
        following = torch.cat([pixels.narrow(axis, 1, last), pixels.narrow(axis, last, 1)], dim=axis)
        pixels = torch.stack([pixels, (pixels + following) / 2], dim=axis + 1).flatten(axis, axis + 1)
    return pixels


def mean_over_pixels(attributes, pixels, axes):
    if axes.tolist() != [1, 2]:
        raise ValueError(f"mean over {axes.tolist()}; this graph is written with rows and columns, [1, 2]")
    return pixels.mean(dim=(2, 3), keepdim=True)


def channels_joined(attributes, first, second, axis):
    if axis.item() not in (3, -1):
        raise ValueError(f"concatenation along {axis.item()}; this graph is written with channels, 3")
    return torch.cat([first, second], dim=1)


OPERATIONS = {
    "Add": lambda _, a, b: a + b,
    "ConcatV2": channels_joined,
    "Conv2D": convolution,
    "DepthwiseConv2dNative": depthwise,
    "FusedDepthwiseConv2dNative": depthwise,
    "Identity": lambda _, a: a,
    "Mean": mean_over_pixels,
    "Mul": lambda _, a, b: a * b,
    "Relu": lambda _, a: a.relu(),
    "Relu6": lambda _, a: nn.functional.relu6(a),
    "ResizeBilinear": twice_as_large,
    "Sigmoid": lambda _, a: a.sigmoid(),
    "_FusedConv2D": convolution,
}
