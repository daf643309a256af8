"""How much the pictures of a prompt differ: a policy can earn its reward by drawing ever the same.

    vendi               effective number of pictures, from 1 to the pictures of a prompt } of the pictures' features,
    pairwise_distance   mean over the pairs of 1 - cosine                                } in a space that is named
    lpips               mean LPIPS over the pairs, where LPIPS_WEIGHTS names its weights
    disagreement        share of the pairs whose tokens differ, mean over positions      } of what was seen while
    entropy             token entropy in nats, mean over positions and pictures          } the pictures were drawn

All of a prompt; means are over prompts, and so are standard errors. `objective/diversity.py` has the formulas.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from reward_funcs import _lpips
from reward_funcs.reconstruction import Loss, pixels
from reward_funcs.runtime import reward_device

from ..objective.diversity import feature_distance, token_disagreement, vendi_score
from ..plugins import resolve
from .scores import mean_and_error, mean_of_tasks

PACKAGE = "gcpo_trl.evaluation.features"
FEATURES = "histogram"  # needs no weights
MEASURES = ("vendi", "pairwise_distance", "lpips", "disagreement", "entropy")
NO_LPIPS = "not measured; set LPIPS_WEIGHTS to a .pth file, which reward_funcs/_lpips.py names"


@dataclass(frozen=True, eq=False)
class Gauge:
    """By what pictures are compared: features, what they are called, and LPIPS or None."""

    features: Callable[[Sequence[Any]], Tensor]
    label: str
    lpips: _lpips.Lpips | None = None

    def labels(self) -> dict[str, str]:
        """What a report says of the numbers."""
        lpips = NO_LPIPS
        if self.lpips is not None:
            lpips = f"LPIPS ({self.lpips.trunk}{', shift-tolerant' if self.lpips.shift_tolerant else ''})"
        return {"features": self.label, "lpips": lpips}


@dataclass(frozen=True)
class Drawn:
    """A picture and what was seen while it was drawn, where that is known: its tokens and their mean entropy."""

    picture: Any
    tokens: Sequence[int] | None = None
    entropy: float | None = None


def drawn_of(pictures: Sequence[Any], rollout: Any) -> list[Drawn]:
    """Pictures with the tokens of the rollout that they were decoded from."""
    entropies = rollout.entropy.cpu().double().mean(dim=1).tolist()
    return [Drawn(*one) for one in zip(pictures, rollout.tokens.tolist(), entropies, strict=True)]


def diversity(
    groups: Sequence[Sequence[Any]],
    features: str | Callable[[Sequence[Any]], Tensor] = FEATURES,
    lpips: _lpips.Lpips | None = None,
) -> dict[str, dict[str, float]]:
    """Mean over groups of PIL images of one prompt each, and its standard error: ``{measure: {"mean", "error"}}``.

    features: "histogram", "clip", "my_pkg.mine:features", or a function ``pictures -> (pictures, dim)``.
    lpips: from `reward_funcs.reconstruction.load_lpips`; None leaves that measure out.
    """
    if not groups:
        raise ValueError("no groups of pictures; give a list of lists, the pictures of one prompt each")
    gauge = Gauge(features, "", lpips) if callable(features) else Gauge(*space_of(features), lpips)
    values = measure([[Drawn(picture) for picture in group] for group in groups], gauge)
    return {name: mean_and_error([value[name] for value in values]) for name in values[0]}


def choose_gauge(features: str, images_per_prompt: int) -> Gauge:
    """The gauge of these features, with LPIPS where ``LPIPS_WEIGHTS`` is set. Raises ValueError."""
    if images_per_prompt < 2:
        raise ValueError(
            f"diversity compares the pictures of a prompt, and there is {images_per_prompt}; write --images-per-prompt "
            "2 or more"
        )
    function, label = space_of(features)
    checked(function([Image.new("RGB", (64, 64), "grey")]), 1)  # loads what it needs, or says what is missing
    options = Loss()
    network = options.network(reward_device(options.device)) if options.weights else None
    return Gauge(function, label, network)


def space_of(name: str) -> tuple[Callable[[Sequence[Any]], Tensor], str]:
    """The function behind a name and what its numbers are called."""
    function = resolve(name, PACKAGE, "features")
    said = getattr(sys.modules.get(function.__module__), "label", None)
    return function, said() if callable(said) else name


def measure(groups: Sequence[Sequence[Drawn]], gauge: Gauge) -> list[dict[str, float]]:
    """The measures of each group. Those of tokens only where every picture of the group has its own."""
    pictures = [one.picture for group in groups for one in group]
    features = checked(gauge.features(pictures), len(pictures))
    parts = features.split([len(group) for group in groups])
    return [measure_group(group, part, gauge) for group, part in zip(groups, parts, strict=True)]


def measure_group(group: Sequence[Drawn], features: Tensor, gauge: Gauge) -> dict[str, float]:
    """Of one group, whose features are ``(group, dim)``."""
    values = {"vendi": vendi_score(features[None]).item(), "pairwise_distance": feature_distance(features[None]).item()}
    if gauge.lpips is not None:
        values["lpips"] = mean_lpips(gauge.lpips, [one.picture for one in group])
    tokens = [one.tokens for one in group if one.tokens is not None]
    if len(tokens) == len(group):
        values["disagreement"] = token_disagreement(torch.tensor(tokens), len(group)).double().mean().item()
    entropies = [one.entropy for one in group if one.entropy is not None]
    if len(entropies) == len(group):
        values["entropy"] = statistics.fmean(entropies)
    return values


def checked(features: Tensor, pictures: int) -> Tensor:
    """The features, a row a picture; raises ValueError where they have no direction."""
    if features.dim() != 2 or len(features) != pictures:
        raise ValueError(f"features of {pictures} pictures have shape {tuple(features.shape)}; return (pictures, dim)")
    lengths = features.double().norm(dim=1)
    broken = (~lengths.isfinite() | (lengths == 0)).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"features of {len(broken)} of {pictures} pictures are zero or not finite, first of picture {broken[0]}; "
            "they have no cosine, so take other features"
        )
    return features


def mean_lpips(network: _lpips.Lpips, pictures: Sequence[Any]) -> float:
    """Mean of `lpips_distance` over the pairs, by one pass a picture.

    It is a squared distance of features f, whose mean over the pairs is 2 / (G - 1) sum_j |f_j - mean|^2.
    """
    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1 or min(min(sizes)) < _lpips.SMALLEST:
        seen = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise ValueError(
            f"pictures of {seen} pixels; LPIPS compares pictures of one size, at least {_lpips.SMALLEST} a side: unset "
            "LPIPS_WEIGHTS to leave it out"
        )
    batch = torch.stack([pixels(picture) for picture in pictures]).to(network.heads[0].device)
    with torch.inference_mode():
        total = 0.0
        for found, head in zip(_lpips.features(network, batch), network.heads, strict=True):
            unit = normalize(found, dim=1, eps=1e-10)
            apart = (unit - unit.mean(dim=0)) ** 2
            total += torch.einsum("c,gchw->hw", head, apart).mean().item()
    return 2 * total / (len(pictures) - 1)


def summarize_groups(
    values: Sequence[Mapping[str, float]], tasks: Sequence[str], by_prompts: bool = False
) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, dict[str, float]]]:
    """``tasks[task][measure]`` and ``overall[measure]``, each ``{"mean", "error"}``, of a group a prompt.

    by_prompts: overall is the mean over all prompts; else that of the task means. Measures that some prompt lacks are
    left out.
    """
    measures = [name for name in MEASURES if all(name in value for value in values)]
    of_task: dict[str, list[Mapping[str, float]]] = {}
    for value, task in zip(values, tasks, strict=True):
        of_task.setdefault(task, []).append(value)
    found = {
        task: {name: mean_and_error([value[name] for value in prompts]) for name in measures}
        for task, prompts in of_task.items()
    }
    weights = [len(prompts) for prompts in of_task.values()] if by_prompts else []
    return found, {name: mean_of_tasks([row[name] for row in found.values()], weights) for name in measures}
