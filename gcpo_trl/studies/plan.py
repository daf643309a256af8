"""Study files: one recipe, and what its runs change in it.

    question: "Does the weight help?"
    recipe: "../shapes_gcpo.yaml"          # beside the study file
    settings: {max_steps: 40}              # of every run
    seeds: 3                               # 0, 1, 2; or a list
    baseline: "GRPO"                       # the arm that the others are compared with, seed by seed
    arms:
      "GRPO": {select_strategies: ["everything"], weight_form: "none"}
      "GCPO": {}
    grid: {num_generations: [4, 8]}        # optional: every arm with every combination
    evaluate: {images_per_prompt: 3}         # optional, see `Measure`

A run is known by its settings, seed and measure, so studies that share an arm share its runs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..evaluation.diversity import FEATURES
from ..policies import family_of
from ..runs.recipe import check_keys, parsed, read_recipe
from ..shapes.build import SHIPPED
from ..trainer.checks import check_image_settings, load_config

STUDY_KEYS = {"question", "recipe", "settings", "seeds", "baseline", "arms", "grid", "evaluate"}
BASE = "base model"  # the row of the model before training
PER_RUN = {"seed", "data_seed", "output_dir"}  # a study sets these itself


@dataclass(frozen=True)
class Measure:
    """How a trained model is judged, on prompts that no run has seen.

    benchmark, images_per_prompt, limit: as `gcpo evaluate` has them. guidance_scales: the first counts, the others are
    further columns; empty is the recipe's own. measure: what arms are compared by. diversity: the features by which
    it is measured, "" for not at all. against: the diversity on the other axis of the Pareto picture.
    batch_size: images drawn at once.
    """

    benchmark: str = "shapes"
    images_per_prompt: int | None = None
    limit: int | None = None
    guidance_scales: tuple[float, ...] = ()
    measure: str = "exact"
    diversity: str = FEATURES
    against: str = "vendi"
    batch_size: int = 256


@dataclass(frozen=True)
class Run:
    """One training run and its evaluation; ``max_steps: 0`` evaluates the model as it is."""

    settings: Mapping[str, Any]
    seed: int
    measure: Measure

    @property
    def key(self) -> str:
        """The same for equal runs of any study."""
        usual = Measure()
        measure = {name: value for name, value in asdict(self.measure).items() if value != getattr(usual, name)}
        content = {"settings": self.settings, "seed": self.seed, "measure": measure}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Study:
    """``arms[name]`` are the runs of an arm in the order of ``seeds``; the base model is an arm of one run."""

    name: str
    question: str
    baseline: str
    seeds: tuple[int, ...]
    measure: Measure
    arms: Mapping[str, list[Run]] = field(default_factory=dict)

    def runs(self) -> list[Run]:
        """Each run once, all arms of a seed before the next seed: a study that is stopped compares what it has."""
        rounds = itertools.zip_longest(*self.arms.values())
        return list({run.key: run for one in rounds for run in one if run is not None}.values())


def read_study(path: Path) -> Study:
    """The study of a file; every setting of every run is checked before any of them starts.

    Raises ValueError that names the file, the arm and what to change.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no study {str(path)!r}; give the path of a YAML file, such as recipes/studies/*.yaml"
        )
    content = yaml.safe_load(path.read_text())
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a study is a list of 'key: value' lines")
    check_keys(content, STUDY_KEYS, str(path))
    for key in ("recipe", "arms", "baseline"):
        if not content.get(key):
            raise ValueError(f"{path} has no {key!r}; gcpo_trl/cli/study_plan.py shows what a study holds")
    measure, seeds = read_measure(content.get("evaluate") or {}, path), read_seeds(content.get("seeds", 3), path)
    recipe = read_recipe(path.parent / content["recipe"])
    common = {key: value for key, value in recipe.items() if key not in PER_RUN} | (content.get("settings") or {})
    arms = dict(combinations(content["arms"], content.get("grid") or {}, path))
    if content["baseline"] not in arms:
        raise ValueError(f"baseline {content['baseline']!r} of {path} is none of its arms: {', '.join(arms)}")
    guidance = [changes.get("rollout_guidance_scale") for changes in arms.values()]
    if len(set(guidance)) > 1 and not measure.guidance_scales:
        raise ValueError(f"arms of {path} draw with different guidance; write evaluate: {{guidance_scales: [...]}}")
    runs = {BASE: [Run(common | {"max_steps": 0}, 0, measure)]}
    for name, changes in arms.items():
        check_run(common | changes, f"{path}, arm {name!r}")
        runs[name] = [Run(common | changes, seed, measure) for seed in seeds]
    return Study(path.stem, content.get("question", ""), content["baseline"], seeds, measure, runs)


def read_measure(content: Mapping[str, Any], path: Path) -> Measure:
    """The ``evaluate`` part of a study."""
    check_keys(content, set(Measure.__dataclass_fields__), f"'evaluate' of {path}")
    scales = content.get("guidance_scales", ())
    if not isinstance(scales, (list, tuple)):
        raise ValueError(f"guidance_scales={scales!r} of {path} is no list; write [{scales}]")
    return Measure(**{**content, "guidance_scales": tuple(float(scale) for scale in scales)})


def read_seeds(seeds: Any, path: Path) -> tuple[int, ...]:
    """A number of seeds, or a list of them."""
    listed = list(range(seeds)) if isinstance(seeds, int) else seeds
    if not isinstance(listed, list) or not listed or len(set(listed)) < len(listed):
        raise ValueError(f"seeds={seeds!r} of {path}; write how many, such as 3, or a list without repeats")
    return tuple(listed)


def combinations(arms: Any, grid: Mapping[str, Any], path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arms by name with what they change, each with every combination of the grid."""
    if not isinstance(arms, dict):
        raise ValueError(f"the arms of {path} are a {type(arms).__name__}; write 'name: {{setting: value}}' for each")
    for name, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"grid has {name}={values!r} in {path}; write a list of values")
    for name, changes in arms.items():
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values, strict=True))
            label = ", ".join([name, *(f"{key} {value}" for key, value in chosen.items())])
            yield label, (changes or {}) | chosen


def check_run(settings: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for what a run would refuse, before anything is loaded or trained."""
    own = PER_RUN & set(settings)
    if own:
        raise ValueError(f"{where} sets {', '.join(sorted(own))}, which a study decides itself; write seeds: [...]")
    try:
        _, args, model_args = parsed({**settings, "output_dir": "unused"}, where=where)
        if args.max_steps <= 0:
            raise ValueError("max_steps is not set; equal numbers of steps are what a study compares at")
        name = model_args.model_name_or_path
        config = load_config(SHIPPED.get(name, name), args)
        if family_of(config) != "text":
            check_image_settings(args, config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: {error}") from error
