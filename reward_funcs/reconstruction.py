"""How near a picture comes to the one it should reconstruct (VA-pi's reward).

    reward = -(w1 * MSE + w2 * LPIPS [+ w3 * L1]),   w1 = w2 = 1, w3 = 0

Pixels are in [-1, 1] and MSE and L1 are means over pixels and channels, as in VA-pi's code (train_t2i_grpo_janus.py).
There the decoder's output is not clamped; a PIL picture is. `reconstruction_loss` takes tensors, clamped or not, and
has a gradient, for training through the decoder.

The target is a dataset column `target`: a path, the bytes of an image file, or a picture. A column called `image` or
`images` would be taken for input of the policy.
"""

from __future__ import annotations

import io
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from reward_funcs._lpips import Lpips, load_lpips, lpips_distance
from reward_funcs.runtime import batches_of_one_size, check_images, dataset_column, reward_device

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

__all__ = [
    "Loss",
    "check_rows",
    "l1",
    "load_lpips",
    "lpips",
    "lpips_distance",
    "mse",
    "reconstruction_loss",
    "reward",
]


@dataclass(frozen=True)
class Loss:
    """Weights of the three terms, where LPIPS's weights lie, and where it runs. Unset, the environment decides.

    weights, backbone: see _lpips.py. A backbone is needed where the weights file has none.
    """

    mse: float = 1.0
    lpips: float = 1.0
    l1: float = 0.0
    weights: str = field(default_factory=lambda: os.environ.get("LPIPS_WEIGHTS", ""))
    backbone: str = field(default_factory=lambda: os.environ.get("LPIPS_BACKBONE", ""))
    device: str = "auto"  # GCPO_REWARD_DEVICE, or else this rank's GPU if there is one
    batch_size: int = 8

    def network(self, device: str) -> Lpips | None:
        """LPIPS on the device, or None where its weight is 0."""
        if not self.lpips:
            return None
        if not self.weights:
            raise ValueError(
                "the reconstruction reward has no LPIPS weights: set LPIPS_WEIGHTS to a .pth file (_lpips.py names "
                "them), or use reward_funcs.reconstruction:mse, which needs none"
            )
        return load_lpips(self.weights, self.backbone, device)


def reward(
    prompts: Sequence[Any],
    completions: Sequence[Image | None],
    target: Sequence[Any],
    loss: Loss | None = None,
    **columns: Any,
) -> list[float | None]:
    """Minus the loss of each picture against its target, at most 0; None where either is None."""
    import torch

    loss = loss or Loss()
    check_images("reconstruction", completions, target=target)
    scored = [i for i, image in enumerate(completions) if image is not None and target[i] is not None]
    rewards: list[float | None] = [None] * len(completions)
    if not scored:
        return rewards
    device = reward_device(loss.device)
    network = loss.network(device)
    images = [image for i in scored if (image := completions[i]) is not None]
    wanted = [target_like(images[place], target[i], f"target[{i}]") for place, i in enumerate(scored)]
    for batch in batches_of_one_size(images, loss.batch_size):
        drawn = torch.stack([pixels(images[place]) for place in batch]).to(device)
        asked = torch.stack([pixels(wanted[place]) for place in batch]).to(device)
        with torch.inference_mode():
            values = reconstruction_loss(network, drawn, asked, loss.mse, loss.lpips, loss.l1)
        for place, value in zip(batch, values.tolist(), strict=True):
            rewards[scored[place]] = -value
    return rewards


def mse(prompts: Any, completions: Any, target: Any, **columns: Any) -> list[float | None]:
    """Minus the mean squared error, for a recipe: reward_funcs.reconstruction:mse."""
    return reward(prompts, completions, target, Loss(mse=1.0, lpips=0.0))


def l1(prompts: Any, completions: Any, target: Any, **columns: Any) -> list[float | None]:
    """Minus the mean absolute error, for a recipe: reward_funcs.reconstruction:l1."""
    return reward(prompts, completions, target, Loss(mse=0.0, lpips=0.0, l1=1.0))


def lpips(prompts: Any, completions: Any, target: Any, **columns: Any) -> list[float | None]:
    """Minus the perceptual distance, for a recipe: reward_funcs.reconstruction:lpips."""
    return reward(prompts, completions, target, Loss(mse=0.0, lpips=1.0))


def reconstruction_loss(
    network: Lpips | None, a: Tensor, b: Tensor, mse: float = 1.0, lpips: float = 1.0, l1: float = 0.0
) -> Tensor:
    """Weighted sum of the terms for each pair, (batch, 3, height, width) in [-1, 1] -> (batch,).

    network: from load_lpips; None leaves LPIPS out. Gradient: flows to both pictures.
    """
    difference = (a - b).flatten(1)
    loss = mse * difference.square().mean(dim=1) + l1 * difference.abs().mean(dim=1)
    return loss if network is None else loss + lpips * lpips_distance(network, a, b)


def check_rows(dataset: Any) -> None:
    """There is a column of targets and its first one opens; the trainer asks before it loads a model.

    Only the first: a column of pictures would be decoded whole.
    """
    for wanted in itertools.islice(dataset_column("reconstruction", dataset, "target"), 1):
        if wanted is not None:
            open_target(wanted, "target[0]")


def target_like(image: Image, wanted: Any, name: str) -> Image:
    """The target as a picture; a ValueError where it has another size than the image."""
    picture = open_target(wanted, name)
    if picture.size != image.size:
        raise ValueError(
            f"{name} is {picture.size[0]} x {picture.size[1]} and the picture drawn {image.size[0]} x {image.size[1]}; "
            "crop and resize the column `target` to the size the model draws"
        )
    return picture


def open_target(wanted: Any, name: str) -> Image:
    """A picture from a path, the bytes of a file, {"bytes", "path"} as `datasets` stores it, or a picture."""
    import PIL.Image

    if isinstance(wanted, dict):
        wanted = wanted.get("bytes") or wanted.get("path")
    if isinstance(wanted, PIL.Image.Image):
        return wanted
    if not isinstance(wanted, str | os.PathLike | bytes):
        raise TypeError(f"{name} is a {type(wanted).__name__}; give a path, the bytes of an image file or a picture")
    try:
        with PIL.Image.open(io.BytesIO(wanted) if isinstance(wanted, bytes) else wanted) as picture:
            return picture.convert("RGB")
    except OSError as error:
        seen = f"{len(wanted)} bytes" if isinstance(wanted, bytes) else repr(wanted)
        raise ValueError(f"{name}, {seen}, is no picture that can be opened: {error}") from error


def pixels(image: Image) -> Tensor:
    """Picture as (3, height, width) in [-1, 1]."""
    import torch

    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
