"""The README a trained image policy is saved and pushed with: what trained it, what it draws, what it scores."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from .. import __version__

PAPER = "https://github.com/zghhui/GCPO"
PACKAGES = ("trl", "transformers", "peft", "torch")
SETTINGS = (
    *("select_strategies", "select_fraction", "select_combine", "weight_form", "weight_clip", "weight_detach"),
    *("divergence", "divergence_on", "divergence_weight"),
    *("rollout_guidance_scale", "temperature", "num_generations", "per_device_train_batch_size"),
    *("gradient_accumulation_steps", "learning_rate", "beta", "loss_type", "max_steps", "seed"),
)
MEASURED = ("reward", "kl", "gcpo/divergence/k3", "gcpo/entropy/all")  # and whatever begins with HELD_OUT
HELD_OUT = "gcpo/held_out/"
SAMPLES = "samples.png"


def write_card(
    folder: Path,
    args: Any,
    history: Sequence[Mapping[str, Any]],
    base: str | None,
    adapter: bool,
    about: dict[str, Any],
) -> Path:
    """Write ``folder/README.md``. ``history`` is the trainer's log; ``about`` has name, repository, dataset, tags."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = sorted((folder / "images").glob("step-*.png"))
    if pictures:
        shutil.copyfile(pictures[-1], folder / SAMPLES)
    name = about["name"] or folder.resolve().name
    known = base if base and not Path(base).is_dir() else None  # the Hub refuses a path
    data = ModelCardData(
        base_model=known,
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-to-image",
        datasets=about["dataset"],
        tags=sorted({"trl", "gcpo", *about["tags"]}),
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"{'A LoRA adapter of' if adapter else 'Fine-tuned from'} `{known or 'a local model'}`"
        f"{' on ' + about['dataset'] if about['dataset'] else ''} with Group Critical-token Policy Optimization "
        f"([GCPO]({PAPER})) in [TRL](https://github.com/huggingface/trl): reinforcement learning on the "
        "critical tokens of each image.",
        *([f"![samples of the last logged step]({SAMPLES})"] if pictures else []),
        "## Draw with it",
        usage(about["repository"] or str(folder), base, adapter, args.rollout_guidance_scale),
        "## What training changed",
        measures(history),
        "## Settings",
        table(("setting", "value"), [(f"`{key}`", f"`{getattr(args, key)}`") for key in SETTINGS]),
        "Versions: "
        + ", ".join([f"gcpo_trl {__version__}", *(f"{package} {version(package)}" for package in PACKAGES)])
        + ".",
    ]
    file = folder / "README.md"
    partial = file.with_suffix(".partial")
    partial.write_text("\n\n".join(parts) + "\n")
    partial.rename(file)
    return file


def usage(model: str, base: str | None, adapter: bool, guidance: float) -> str:
    """The command that draws with the checkpoint."""
    source = f"--model {base or 'BASE_MODEL'} --adapter {model}" if adapter else f"--model {model}"
    return f'```bash\ngcpo sample {source} --guidance-scale {guidance:g} --prompt "a photo of a red circle"\n```'


def measures(history: Sequence[Mapping[str, Any]]) -> str:
    """First and last logged value of the training measures and of everything held out."""
    found: dict[str, list[float]] = {}
    for entry in history:
        for key, value in entry.items():
            if key in MEASURED or key.startswith(HELD_OUT):
                found.setdefault(key, []).append(float(value))
    if not found:
        return "Nothing was logged."
    rows = [(f"`{key}`", f"{values[0]:.4g}", f"{values[-1]:.4g}") for key, values in sorted(found.items())]
    return table(("measure", "first", "last"), rows)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
