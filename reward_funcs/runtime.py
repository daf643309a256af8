"""What every image reward needs: options from the environment, the device, which completions can be scored."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

DEVICE_VARIABLE = "GCPO_REWARD_DEVICE"


def reward_device(device: str) -> str:
    """The device asked for; of "auto", GCPO_REWARD_DEVICE, or else this rank's GPU if there is one."""
    import torch

    if device != "auto":
        return device
    return os.environ.get(DEVICE_VARIABLE) or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def whole_weights() -> Iterator[None]:
    """Inside, `from_pretrained` loads a whole model on each rank, also where a ZeRO-3 run would shard it.

    transformers decides by a process-wide setting, and a reward's model is no part of the engine that could gather it.
    """
    from transformers.integrations import deepspeed

    reference: Any = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if reference is not None and (config := reference()) is not None:
            deepspeed.set_hf_deepspeed_config(config)


def check_images(name: str, completions: Sequence[Any], **columns: Sequence[Any]) -> None:
    """Every completion is a PIL image or None, and every column named has one entry a completion."""
    from PIL.Image import Image

    for index, completion in enumerate(completions):
        if completion is not None and not isinstance(completion, Image):
            raise TypeError(
                f"{name}: completions[{index}] is {type(completion).__name__}; this reward scores PIL images "
                "(None for an image that failed), so use it with an image policy"
            )
    for column, values in columns.items():
        if len(values) != len(completions):
            raise ValueError(f"{name}: {len(values)} {column} for {len(completions)} completions; give one each")


def dataset_column(name: str, dataset: Any, column: str) -> Sequence[Any]:
    """A column of a dataset, or of a dictionary of lists; a ValueError says which reward misses which column."""
    columns = list(getattr(dataset, "column_names", dataset))
    if column not in columns:
        raise ValueError(f"{name} reads the column {column!r}, and the dataset has {columns}; add or rename it")
    return dataset[column]


def prompt_text(prompt: str | Sequence[dict[str, Any]]) -> str:
    """Text of a prompt; of a conversation, that of its last user message."""
    if isinstance(prompt, str):
        return prompt
    users = [message["content"] for message in prompt if message.get("role") == "user"]
    if not users:
        raise ValueError(f"the prompt {prompt!r} has no user message; write a string or add one with role 'user'")
    content = users[-1]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def rewards_of(
    name: str,
    prompts: Sequence[Any],
    completions: Sequence[Image | None],
    score: Callable[[list[Image], list[str]], Sequence[float]],
) -> list[float | None]:
    """`score(images, texts)` of the completions that are images, each with its prompt's text; None for the others.

    `score` is not called where there is no image, so that no model loads.
    """
    check_images(name, completions, prompts=prompts)
    images = {index: image for index, image in enumerate(completions) if image is not None}
    rewards: list[float | None] = [None] * len(completions)
    if images:
        values = score(list(images.values()), [prompt_text(prompts[index]) for index in images])
        for index, value in zip(images, values, strict=True):
            rewards[index] = value
    return rewards


def batches_of_one_size(images: Sequence[Image], batch_size: int) -> Iterator[list[int]]:
    """Indices of the images in batches within which all have one size, so that none is padded for another's sake."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for index, image in enumerate(images):
        by_size.setdefault(image.size, []).append(index)
    for indices in by_size.values():
        for start in range(0, len(indices), batch_size):
            yield indices[start : start + batch_size]
