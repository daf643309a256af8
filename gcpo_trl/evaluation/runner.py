"""A benchmark from model to report: draw what is missing, judge what is drawn, sum up.

Pictures are drawn in batches that depend on their indices alone, and judged from their files in parts that do too, so a
run that was stopped and goes on ends with the same pictures and the same report, byte for byte, on the same machine.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from tqdm import tqdm

from .. import __version__
from ..rollout import Sampling, sample
from .benchmark import Benchmark
from .diversity import drawn_of
from .diversity_report import with_diversity
from .folder import Folder, write_whole
from .ranks import Ranks
from .scores import MOST_FAILED, by_prompt, footnote, markdown, summarize

PACKAGES = ("torch", "transformers", "pillow")
JUDGED_AT_ONCE = 64  # pictures a judge is given
PROBES = 64  # entries of each parameter that its fingerprint reads


def settings_of(
    policy: Any, benchmark: Benchmark, sampling: Sampling, seed: int, model: str, adapter: str | None
) -> dict[str, Any]:
    """What decides the pictures, as JSON: the folder keeps it, and the report repeats it."""
    rows = json.dumps(benchmark.rows, sort_keys=True).encode()
    parameter = next(policy.model.parameters())
    device = parameter.device
    return {
        "benchmark": benchmark.name,
        "prompts": len(benchmark.rows),
        "prompts_sha256": hashlib.sha256(rows).hexdigest(),
        "images_per_prompt": benchmark.images_per_prompt,
        "model": model,
        "adapter": adapter,
        "weights": fingerprint(policy.model),
        "sampling": asdict(sampling),
        "seed": seed,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "versions": {"gcpo_trl": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def fingerprint(model: torch.nn.Module) -> str:
    """SHA-256 over name, shape, type and 64 evenly spaced entries of each parameter: other weights, another value."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        where = torch.linspace(0, len(values) - 1, min(PROBES, len(values)), dtype=torch.float64).round().long()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(values[where.to(values.device)].cpu().double().numpy().tobytes())
    return digest.hexdigest()


def draw(policy: Any, benchmark: Benchmark, folder: Folder, sampling: Sampling, seed: int, ranks: Ranks) -> None:
    """Draw this rank's share of the pictures that are not there yet.

    A batch of which any is missing is drawn whole: in another batch, rounding could change a picture.
    """
    total = len(benchmark.rows) * benchmark.images_per_prompt
    size = sampling.batch_size or total
    batches = ranks.share([range(start, min(start + size, total)) for start in range(0, total, size)])
    images = sum(map(len, batches))
    with tqdm(total=images, desc="drawn", unit="image", disable=ranks.rank > 0) as progress:
        for batch in batches:
            missing = {index for index in batch if not folder.has(index)}
            progress.update(len(batch) - len(missing))
            if missing:
                rows = [benchmark.rows[index // benchmark.images_per_prompt] for index in batch]
                rollout = sample(policy, [row["prompt"] for row in rows], seed, batch, sampling)
                drawn = drawn_of(policy.decode(rollout.tokens), rollout)
                for index, row, one in zip(batch, rows, drawn, strict=True):
                    if index in missing:
                        folder.save(index, one.picture, row, one.tokens, one.entropy)
                        progress.update()


def judge(benchmark: Benchmark, folder: Folder, ranks: Ranks) -> list[dict[str, float | None]]:
    """``{measure: value}`` of every picture, read from its file; each rank judges its share and all know all."""
    own: list[tuple[int, dict[str, float | None]]] = []
    parts = ranks.share(parts_to_judge(benchmark))
    images = sum(len(indices) for _, indices in parts)
    with tqdm(total=images, desc="judged", unit="image", disable=ranks.rank > 0) as progress:
        for task, indices in parts:
            rows = [benchmark.rows[index // benchmark.images_per_prompt] for index in indices]
            values = benchmark.judges[task](rows, [folder.read(index) for index in indices])
            own += [(index, {m: values[m][place] for m in values}) for place, index in enumerate(indices)]
            progress.update(len(indices))
    judged = dict(gather_object(own) if ranks.world > 1 else own)
    return [judged[index] for index in range(len(judged))]


def parts_to_judge(benchmark: Benchmark) -> list[tuple[str, list[int]]]:
    """Task and indices of the pictures that are judged together."""
    of_task: dict[str, list[int]] = {}
    for prompt, task in enumerate(benchmark.tasks):
        first = prompt * benchmark.images_per_prompt
        of_task.setdefault(task, []).extend(range(first, first + benchmark.images_per_prompt))
    return [
        (task, indices[start : start + JUDGED_AT_ONCE])
        for task, indices in of_task.items()
        for start in range(0, len(indices), JUDGED_AT_ONCE)
    ]


def run(
    policy: Any,
    benchmark: Benchmark,
    folder: Folder,
    settings: Mapping[str, Any],
    ranks: Ranks | None = None,
    most_failed: float = MOST_FAILED,
) -> dict[str, Any]:
    """Draw, judge, report; the same on every rank. The folder must be open under these settings."""
    ranks = ranks or Ranks()
    draw(policy, benchmark, folder, Sampling(**settings["sampling"]), settings["seed"], ranks)
    if ranks.world > 1:
        gather_object([ranks.rank])  # every picture is on disk before any is judged
    rows = by_prompt(benchmark, judge(benchmark, folder, ranks))
    report = {
        "benchmark": benchmark.name,
        "label": benchmark.label,
        "images": len(benchmark.rows) * benchmark.images_per_prompt,
        "scale": benchmark.scale,
        "overall_over": "prompts" if benchmark.by_prompts else "tasks",
        **summarize(benchmark, rows, most_failed),
        "judge": dict(benchmark.judged_by),
        "settings": dict(settings),
        "scores": rows,
    }
    return report if benchmark.gauge is None else with_diversity(report, benchmark, folder, ranks)


def write_report(report: Mapping[str, Any], headings: Mapping[str, str], file: Path) -> None:
    """The report as JSON in `file`, and its table as Markdown beside it."""
    write_whole(file, (json.dumps(report, indent=1) + "\n").encode())
    text = f"{markdown(report, headings)}\n\n{footnote(report)}\n"
    write_whole(file.with_suffix(".md"), text.encode())
