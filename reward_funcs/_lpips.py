"""LPIPS and its shift-tolerant variant in plain torch: how different two pictures look.

    d(a, b) = sum over 5 layers of mean over positions of w . (normalise(f(a)) - normalise(f(b)))^2

f are the features of an AlexNet or VGG16 trained on ImageNet, normalised over channels, w >= 0 the learned weights of a
layer's channels (Zhang et al. 2018). The shift-tolerant variant (Ghildyal and Liu 2022) pools without aliasing: a max
pool of stride 1, then a blur of stride 2; its AlexNet blurs after the first convolution too. Same code path, other
weights, so its distances are not LPIPS's.

Files read, always with weights_only=True and to the last key:
    stlpips_pytorch/weights/vST0.0/{alex,vgg}_shift_tolerant.pth   features and w
    lpips/weights/v0.1/{alex,vgg}.pth                              w alone; features from torchvision's AlexNet or VGG16
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

SHIFT = (-0.030, -0.088, -0.188)  # lpips ScalingLayer: ImageNet's mean and deviation for pictures in [-1, 1]
SCALE = (0.458, 0.448, 0.450)
BLUR = (0.25, 0.5, 0.25)  # Downsample(filt_size=3)
BLUR_PADDING = 2  # Downsample(pad_more=True)
SMALLEST = 32  # pixels; AlexNet's last layer has no position left below 31
# By trunk: channels and kernel side of the convolutions of each layer.
LAYERS = {
    "alex": (((64, 11),), ((192, 5),), ((384, 3),), ((256, 3),), ((256, 3),)),
    "vgg": (((64, 3),) * 2, ((128, 3),) * 2, ((256, 3),) * 3, ((512, 3),) * 3, ((512, 3),) * 3),
}
POOLED = {"alex": (1, 2), "vgg": (1, 2, 3, 4)}  # layers that begin with a max pool
POOL = {"alex": 3, "vgg": 2}  # its side
CONVOLUTION = re.compile(r"(?:net\.slice\d|features)\.(\d+)\.weight")  # numbered through in both layouts


@dataclass(frozen=True, eq=False)
class Lpips:
    """Weights of one network. convolutions: (weight, bias) by layer; heads: w of each layer, (channels,)."""

    trunk: str
    shift_tolerant: bool
    convolutions: tuple[tuple[tuple[Tensor, Tensor], ...], ...]
    heads: tuple[Tensor, ...]


def lpips_distance(network: Lpips, a: Tensor, b: Tensor) -> Tensor:
    """Distance of each pair of pictures, (batch, 3, height, width) in [-1, 1] -> (batch,). Gradient: flows to both."""
    import torch
    from torch.nn.functional import normalize

    if a.shape != b.shape:
        raise ValueError(f"pictures of shape {tuple(a.shape)} and {tuple(b.shape)}; resize one to the other")
    if min(a.shape[-2:]) < SMALLEST:
        raise ValueError(f"pictures of {a.shape[-1]} x {a.shape[-2]} pixels; LPIPS needs at least {SMALLEST} a side")
    distance = a.new_zeros(len(a))
    for found, head in zip(features(network, torch.cat([a, b])), network.heads, strict=True):
        # normalize() has a gradient where all channels are 0, which a quotient by a square root has not.
        first, second = normalize(found, dim=1, eps=1e-10).chunk(2)
        distance = distance + torch.einsum("c,bchw->bhw", head, (first - second) ** 2).mean(dim=(1, 2))
    return distance


def features(network: Lpips, pictures: Tensor) -> Iterator[Tensor]:
    """Features of each layer, (batch, channels, height, width)."""
    from torch.nn.functional import conv2d, max_pool2d, relu

    shift, scale = (pictures.new_tensor(numbers)[:, None, None] for numbers in (SHIFT, SCALE))
    found = (pictures - shift) / scale
    for index, convolutions in enumerate(network.convolutions):
        if index in POOLED[network.trunk]:
            found = max_pool2d(found, POOL[network.trunk], stride=1 if network.shift_tolerant else 2)
            found = blurred(found) if network.shift_tolerant else found
        for weight, bias in convolutions:
            first_of_alex = weight.shape[-1] == 11
            stride = 4 if first_of_alex and not network.shift_tolerant else 1
            found = conv2d(found, weight, bias, stride, padding=min(weight.shape[-1] // 2, 2))
            found = relu(blurred(found) if first_of_alex and network.shift_tolerant else found)
        yield found


def blurred(pictures: Tensor) -> Tensor:
    """Binomial blur of stride 2, each channel for itself: about half the height and width."""
    from torch.nn.functional import conv2d, pad

    side = pictures.new_tensor(BLUR)
    kernel = side.outer(side).expand(pictures.shape[1], 1, -1, -1)
    return conv2d(pad(pictures, (BLUR_PADDING,) * 4, mode="reflect"), kernel, stride=2, groups=pictures.shape[1])


@functools.cache
def load_lpips(weights: str, backbone: str, device: str) -> Lpips:
    """The network of a weights file, loaded once a process. backbone: a file, or "" where weights has all."""
    state = read_state(weights)
    if not any(key.startswith("net.") for key in state):
        if not backbone:
            raise ValueError(
                f"{weights} has the weights of LPIPS's layers alone; set LPIPS_BACKBONE to torchvision's weights of "
                "the same network (alexnet-owt-7be5be79.pth or vgg16-397923af.pth), or use a shift-tolerant file, "
                "which has both"
            )
        state |= {key: value for key, value in read_state(backbone).items() if not key.startswith("classifier.")}
    return lpips_network({key: value.to(device) for key, value in state.items()})


def read_state(path: str) -> dict[str, Tensor]:
    """Tensors of a .pth file; no pickled code runs."""
    import torch

    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"there is no LPIPS file {path!r}; correct LPIPS_WEIGHTS or LPIPS_BACKBONE")
    return dict(torch.load(file, map_location="cpu", weights_only=True))


def lpips_network(state: Mapping[str, Tensor]) -> Lpips:
    """Network of a state dict in lpips's or stlpips's layout; a ValueError names what is missing or does not belong."""
    second = state.get("lin1.model.1.weight")
    trunk = {192: "alex", 128: "vgg"}.get(0 if second is None else second.shape[1])
    if trunk is None:
        raise ValueError(
            "these are not LPIPS weights of AlexNet or VGG16: lin1.model.1.weight has no 192 or 128 inputs"
        )
    taken: set[str] = set()

    def take(key: str, *shape: int) -> Tensor:
        if key not in state or state[key].shape != shape:
            seen = tuple(state[key].shape) if key in state else "absent"
            raise ValueError(f"LPIPS weight {key!r} is {seen}; {trunk} needs {shape}")
        taken.add(key)
        return state[key].detach()

    keys = sorted((int(match[1]), key) for key in state if (match := CONVOLUTION.fullmatch(key)))
    needed = sum(map(len, LAYERS[trunk]))
    if len(keys) != needed:
        raise ValueError(f"the backbone has {len(keys)} convolutions, {trunk} needs {needed}")
    names, width, convolutions = iter(keys), 3, []
    for layer in LAYERS[trunk]:
        pairs = []
        for channels, kernel in layer:
            key = next(names)[1]
            pairs.append((take(key, channels, width, kernel, kernel), take(f"{key[:-6]}bias", channels)))
            width = channels
        convolutions.append(tuple(pairs))
    heads = [take(f"lin{i}.model.1.weight", 1, layer[-1][0], 1, 1).flatten() for i, layer in enumerate(LAYERS[trunk])]
    check_rest({key: value for key, value in state.items() if key not in taken})
    return Lpips(trunk, any(key.endswith(".filt") for key in state), tuple(convolutions), tuple(heads))


def check_rest(rest: Mapping[str, Tensor]) -> None:
    """What is left is a constant of this file or a layer's weights by a second name; a ValueError names the rest."""
    import torch

    side = torch.tensor(BLUR)
    constants = {"shift": torch.tensor(SHIFT), "scale": torch.tensor(SCALE), "filt": side.outer(side).flatten()}
    for key, value in rest.items():
        if re.fullmatch(r"lins\.\d\.model\.1\.weight", key):
            continue
        known = constants.get(key.rpartition(".")[-1])
        given = value.cpu().flatten()
        if known is None or len(given) % len(known) or not torch.allclose(given.view(-1, len(known)), known, atol=1e-6):
            raise ValueError(
                f"unexpected LPIPS weight {key!r} of shape {tuple(value.shape)}; the docstring lists files"
            )
