"""Every file of recipes/: YAML and Python at once, with names that resolve and a trainer that builds."""

import ast
import builtins
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from tiny import PROMPTS

from gcpo_trl.cli import launch
from gcpo_trl.prompts import generate
from gcpo_trl.prompts.files import STYLES
from gcpo_trl.prompts.geneval import official_text
from gcpo_trl.rewards.loading import load_reward
from gcpo_trl.runs.build import build_trainer
from gcpo_trl.runs.datasets import load_prompts
from gcpo_trl.runs.recipe import parse, read_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))
JANUS = [path for path in RECIPES if path.name.startswith("janus")]
METADATA = '{"tag": "single_object", "include": [{"class": "cat", "count": 1}]}'
CPU = ["--use_cpu", "true"]  # the Janus recipes ask for bf16, which TRL allows on a GPU or where a CPU is asked for

# GCPO, Table 5: learning rate, beta, images a prompt, guidance, prompts a GPU, steps, accumulation, clip of the weight
TABLE_5 = {
    "janus1b_geneval": (3e-6, 0.01, 4, 5.0, 2, 1600, 1, 1.0),
    "janus1b_hpsv2": (1e-6, 0.01, 4, 5.0, 2, 1600, 1, 0.5),
    "janus7b_geneval": (3e-6, 0.01, 4, 5.0, 2, 1600, 1, 0.6),
    "janus7b_hpsv2": (1e-6, 0.01, 8, 5.0, 4, 1600, 1, 1.0),
}

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture
def prompts_file(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": p, "metadata": METADATA}) + "\n" for p in PROMPTS * 16))
    return file


def run_as_python(path):
    """Annotations of the recipe as Python sees them, and what its last line called."""
    called = []

    def imported(name, *args, **kwargs):
        return SimpleNamespace(run_recipe=lambda file: called.append((name, file)))

    space = {"__file__": str(path), "__builtins__": vars(builtins) | {"__import__": imported}}
    exec(compile(path.read_text(), str(path), "exec"), space)
    # Python 3.14 no longer evaluates annotations on the way
    return (space["__annotations__"] if "__annotations__" in space else space["__annotate__"](1)), called


def test_the_recipes_are_found():
    assert {path.stem for path in RECIPES} >= {"shapes_gcpo", *TABLE_5}


@every_recipe
def test_yaml_and_python_read_the_same_values(path):
    annotations, called = run_as_python(path)
    settings = yaml.safe_load(path.read_text())
    assert annotations.pop("launch") is object and "run_recipe(__file__)" in settings.pop("launch")
    assert annotations == settings
    assert [type(value) for value in annotations.values()] == [type(value) for value in settings.values()]
    assert called == [("gcpo_trl.cli.launch", str(path))]


@every_recipe
def test_a_recipe_is_nothing_but_settings_and_the_launch(path):
    # A key given twice would silently be the last in YAML.
    lines = ast.parse(path.read_text()).body
    names = [line.target.id for line in lines if isinstance(line, ast.AnnAssign)]
    assert len(names) == len(lines) == len(set(names))
    assert [line.target.id for line in lines if line.value is not None] == names[-1:] == ["launch"]


@every_recipe
def test_every_setting_arrives(path):
    parts = parse([str(path), *CPU])
    for key, value in read_recipe(path).items():
        holders = [part for part in parts if hasattr(part, key)]
        assert len(holders) == 1, f"{key} belongs to {holders}"
        arrived = getattr(holders[0], key)
        expected = [] if value == ["none"] else value  # transformers' word for no tracker
        assert getattr(arrived, "value", arrived) == expected, key


@every_recipe
def test_names_resolve(path):
    for name in read_recipe(path)["reward_funcs"]:
        assert load_reward(name).__name__ == name.rpartition(":")[-1]


@pytest.mark.parametrize("path", JANUS, ids=lambda path: path.stem)
def test_the_settings_are_those_of_table_5(path):
    _, args, _ = parse([str(path), *CPU])
    assert TABLE_5[path.stem] == (
        args.learning_rate,
        args.beta,
        args.num_generations,
        args.rollout_guidance_scale,
        args.per_device_train_batch_size // args.num_generations,
        args.max_steps,
        args.gradient_accumulation_steps,
        args.weight_clip,
    )
    assert args.max_grad_norm == 1.0 and args.loss_type == "bnpo"
    assert args.select_strategies == ["initial", "entropy_gradient", "similarity"] and args.select_fraction == 0.1


@pytest.mark.parametrize("path", JANUS, ids=lambda path: path.stem)
def test_a_janus_recipe_builds_a_trainer(path, tiny_janus, prompts_file, tmp_path):
    changed = {
        "model_name_or_path": tiny_janus,
        "dataset_name": str(prompts_file),
        "output_dir": str(tmp_path / "out"),
        "report_to": "none",
        "bf16": "false",
        "dtype": "float32",
    }
    words = [word for key, value in changed.items() for word in (f"--{key}", value)]
    trainer = build_trainer(*parse([str(path), *CPU, *words]))
    settings = read_recipe(path)
    assert trainer.num_generations == settings["num_generations"]
    assert [reward.__name__ for reward in trainer.reward_funcs] == settings["reward_funcs"]
    assert trainer.ref_model is not None and trainer.policy.num_tokens == 81
    trained = {name.split(".")[1] for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == set(settings["train_modules"])


# reading


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def test_the_command_line_overrides_the_recipe(tmp_path):
    path = write(tmp_path, 'output_dir: "a"\nlearning_rate: 1.0e-4\nselect_fraction: 0.2\nuse_cpu: True\nbf16: False\n')
    _, args, _ = parse([path, "--learning_rate", "2e-4", "--select_strategies", "initial", "random"])
    assert (args.learning_rate, args.select_fraction, args.select_strategies) == (2e-4, 0.2, ["initial", "random"])
    _, args, _ = parse(["--config", path, "--select-fraction=0.3"])
    assert (args.learning_rate, args.select_fraction) == (1e-4, 0.3)


def test_settings_may_come_without_a_recipe():
    run, args, model = parse(["--output_dir", "a", "--model_name_or_path", "shapes-janus", *CPU, "--dataset_size", "7"])
    assert (run.dataset_size, run.reward_funcs, model.model_name_or_path) == (7, ["shapes"], "shapes-janus")
    assert args.output_dir == "a"


def test_an_unknown_key_gives_the_nearest(tmp_path):
    path = write(tmp_path, 'output_dir: "a"\nselect_fractoin: 0.2\n')
    with pytest.raises(
        ValueError, match="the recipe has an unknown key 'select_fractoin'; did you mean select_fraction"
    ):
        parse([path])
    path = write(tmp_path, 'output_dir: "a"\n')
    with pytest.raises(ValueError, match="the command line has an unknown key 'wieght_clip'; did you mean weight_clip"):
        parse([path, "--wieght_clip", "0.3"])


def test_a_recipe_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"there is no recipe '.*missing.yaml'"):
        parse([str(tmp_path / "missing.yaml")])
    with pytest.raises(ValueError, match="holds a list; a recipe is a list of 'key: value' lines"):
        parse([write(tmp_path, "- a\n- b\n")])


def test_a_wrong_value_names_its_setting(tmp_path):
    path = write(tmp_path, 'output_dir: "a"\nuse_cpu: True\nweight_form: "log"\n')
    with pytest.raises(ValueError, match="weight_form='log' is unknown; use one of exp, linear, none"):
        parse([path])


def test_env_is_set_before_anything_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GCPO_TEST_VARIABLE", "old")
    parse([write(tmp_path, 'output_dir: "a"\nuse_cpu: True\nenv: {GCPO_TEST_VARIABLE: 3}\n')])
    assert os.environ["GCPO_TEST_VARIABLE"] == "3"


def test_a_launched_recipe_trains_with_the_words_behind_it(monkeypatch):
    seen = []
    monkeypatch.setattr("gcpo_trl.cli.launch.main", lambda words: seen.append(words) or 0)
    monkeypatch.setattr("sys.argv", ["recipe.yaml", "--max_steps", "2"])
    with pytest.raises(SystemExit) as ended:
        launch.run_recipe("recipe.yaml")
    assert ended.value.code == 0
    assert seen == [["train", "recipe.yaml", "--max_steps", "2"]]


# datasets


def test_prompts_come_from_files_and_from_the_shapes_world(tmp_path, prompts_file):
    assert load_prompts(str(prompts_file), "train", 0, 0)[1]["prompt"] == PROMPTS[1]
    lines = tmp_path / "lines.txt"
    lines.write_text("a cat\n\n  a dog \n")
    assert load_prompts(str(lines), "train", 0, 0)["prompt"] == ["a cat", "a dog"]
    world = load_prompts("shapes", "train", 12, seed=3)
    assert len(world) == 12 and set(world.column_names) == {"prompt", "metadata", "tag"}
    assert world["prompt"] == load_prompts("shapes", "train", 12, seed=3)["prompt"]
    assert world["prompt"] != load_prompts("shapes", "train", 12, seed=4)["prompt"]


def test_genevals_tasks_can_be_trained_on_but_not_its_prompts():
    drawn = load_prompts("geneval-train", "train", 12, seed=3)
    assert list(drawn) == generate(12, 3).rows
    with pytest.raises(ValueError, match="'geneval' is the benchmark itself; train on 'geneval-train'"):
        load_prompts("geneval", "train", 12, seed=3)


def test_files_that_arrow_cannot_read_are_prompts_too(tmp_path):
    # A position is [relation, index]: text and a number in one list.
    (tmp_path / "official.jsonl").write_text(official_text())
    assert len(load_prompts(str(tmp_path / "official.jsonl"), "train", 0, 0)) == 553
    for style in STYLES:
        (tmp_path / f"{style}.json").write_text(f'["a {style} of a cat"]')
    assert load_prompts(str(tmp_path), "train", 0, 0)["style"] == ["anime", "concept-art", "paintings", "photo"]


@pytest.mark.parametrize("name", ["data/missing.jsonl", "data/missing.txt", "data/missing.parquet"])
def test_a_missing_file_is_named(name):
    with pytest.raises(
        ValueError, match=f"'{name}' is not a file; give an existing file, a hub id, 'shapes' or 'geneval-train'"
    ):
        load_prompts(name, "train", 0, 0)
