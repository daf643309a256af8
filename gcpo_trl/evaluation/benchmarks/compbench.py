"""T2I-CompBench: one file of prompts a task (color_val.txt, spatial_val.txt, ...), ten images a prompt.

Each task has its own judge, by the first word of its file's name. There is no overall: the scales differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...prompts import load
from ..benchmark import Benchmark, Row, rewards_judge

IMAGES_PER_PROMPT = 10
CLIP = "openai/clip-vit-base-patch32"  # CLIPScore_eval/CLIP_similarity.py


def clip_b32(prompts: Any, completions: Any, **columns: Any) -> list[float | None]:
    """The benchmark's CLIPScore: bare cosine under ViT-B/32."""
    from reward_funcs.clipscore import Scorer, reward

    return reward(prompts, completions, Scorer(model=CLIP))


# Start of a file's name -> reward.
REWARDS: dict[str, Any] = {
    "color": "blip_vqa",
    "shape": "blip_vqa",
    "texture": "blip_vqa",
    "spatial": "spatial_2d",
    "numeracy": "numeracy",
    "non_spatial": clip_b32,
    "complex": "compbench_3in1",
}


def benchmark(prompts: Sequence[Path], rewards: Sequence[Any]) -> Benchmark:
    """A task a file; `rewards` judge all of them, instead of each by its own."""
    if not prompts:
        raise ValueError("compbench needs its files of prompts; write --prompts color_val.txt spatial_val.txt ...")
    rows: list[Row] = []
    tasks: list[str] = []
    judges, labels = {}, []
    for file in prompts:
        if file.stem in judges:
            raise ValueError(f"two files of prompts are called {file.stem!r}, which names their task; rename one")
        read = load(file)
        judges[file.stem], names = rewards_judge(rewards or [reward_of(file)], read)
        labels += names
        rows += read
        tasks += [file.stem] * len(read)
    return Benchmark("compbench", ", ".join(dict.fromkeys(labels)), rows, tasks, judges, IMAGES_PER_PROMPT)


def reward_of(file: Path) -> Any:
    """The reward of a file by its name."""
    for start, reward in REWARDS.items():
        if file.stem == start or file.stem.startswith(f"{start}_"):
            return reward
    raise ValueError(
        f"{file.name} says no task; begin its name with {', '.join(REWARDS)}, or say --rewards NAME for all files"
    )
