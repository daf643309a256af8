"""Studies: what a file asks for, what is refused before a run starts, and the arithmetic of the table."""

import json
import math
from pathlib import Path

import pytest
import yaml

from gcpo_trl.cli.main import main
from gcpo_trl.cli.study import benchmark_of, last_words, launch, mark, outcome, parts_of, result_file, slots_of
from gcpo_trl.studies.figure import pareto_front
from gcpo_trl.studies.plan import BASE, Measure, read_study
from gcpo_trl.studies.statistics import Arm, differences, interval, minutes, table

STUDIES = sorted((Path(__file__).parents[2] / "recipes/studies").glob("*.yaml"))
RECIPE = {
    "model_name_or_path": "shapes-janus",
    "output_dir": "outputs/x",
    "seed": 5,
    "use_cpu": True,
    "bf16": False,
    "max_steps": 9,
    "per_device_train_batch_size": 8,
}
STUDY = {
    "question": "Does it?",
    "recipe": "recipe.yaml",
    "settings": {"max_steps": 3},
    "seeds": 2,
    "baseline": "GRPO",
    "arms": {"GRPO": {"select_strategies": ["everything"], "weight_form": "none"}, "GCPO": None},
}


def write(folder, **changes):
    """A study file beside its recipe; a change to None leaves the key out."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    content = {key: value for key, value in {**STUDY, **changes}.items() if value is not None}
    file = folder / "which.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def test_arms_seeds_and_settings(tmp_path):
    study = read_study(write(tmp_path))
    assert (study.name, study.seeds, list(study.arms)) == ("which", (0, 1), [BASE, "GRPO", "GCPO"])
    grpo, gcpo = study.arms["GRPO"], study.arms["GCPO"]
    assert [run.seed for run in grpo] == [0, 1]
    assert grpo[0].settings["weight_form"] == "none" and "weight_form" not in gcpo[0].settings
    assert (
        gcpo[1].settings["max_steps"] == 3 and "output_dir" not in gcpo[1].settings and "seed" not in gcpo[1].settings
    )
    assert study.arms[BASE][0].settings["max_steps"] == 0
    # base, then both arms of seed 0, then both of seed 1
    assert [(run.seed, run.settings.get("weight_form")) for run in study.runs()[1:]] == [
        *[(0, "none"), (0, None)],
        *[(1, "none"), (1, None)],
    ]


def test_equal_runs_are_one_run_whatever_the_study_calls_them(tmp_path):
    (tmp_path / "other").mkdir()
    arms = {"one": {}, "the same": {"max_steps": 3}, "another": {"weight_clip": 0.4}}
    one, other = read_study(write(tmp_path)), read_study(write(tmp_path / "other", arms=arms, baseline="one"))
    assert other.arms["one"][0].key == other.arms["the same"][0].key == one.arms["GCPO"][0].key
    assert other.arms["another"][0].key != other.arms["one"][0].key != other.arms["one"][1].key
    assert len(other.runs()) == 1 + 2 * 2


def test_a_grid_takes_every_arm_through_every_combination(tmp_path):
    grid = {"num_generations": [4, 8], "weight_clip": [0.5]}
    study = read_study(write(tmp_path, grid=grid, baseline="GCPO, num_generations 4, weight_clip 0.5"))
    assert list(study.arms)[1:] == [
        f"{arm}, num_generations {group}, weight_clip 0.5" for arm in ("GRPO", "GCPO") for group in (4, 8)
    ]
    assert study.arms["GCPO, num_generations 8, weight_clip 0.5"][0].settings["num_generations"] == 8


MISTAKES = [
    ({"seed": 3}, "unknown key 'seed'; did you mean seeds"),
    ({"baseline": "GPRO"}, "baseline 'GPRO' .* none of its arms: GRPO, GCPO"),
    ({"recipe": "missing.yaml"}, "there is no recipe"),
    (
        {"arms": {"GRPO": {}, "GCPO": {"select_fractoin": 0.2}}},
        "arm 'GCPO'.*'select_fractoin'; did you mean select_fra",
    ),
    ({"grid": {"wieght_clip": [1.0]}, "baseline": "GRPO, wieght_clip 1.0"}, "unknown key 'wieght_clip'"),
    ({"grid": {"weight_clip": 1.0}}, "weight_clip=1.0 .*write a list"),
    ({"arms": {"GRPO": {"select_fraction": 0.01}}}, "arm 'GRPO': select_fraction=0.01 keeps 0 of 81 tokens"),
    ({"arms": {"GRPO": {"select_fraction": 0.4}}}, "arm 'GRPO': select_fraction=0.4 .* 1.2 of all tokens"),
    ({"arms": {"GRPO": {"seed": 3}}}, "arm 'GRPO' sets seed, which a study decides itself"),
    ({"arms": ["GRPO"]}, "the arms of .* are a list"),
    ({"seeds": [1, 1]}, r"seeds=\[1, 1\]"),
    ({"seeds": 0}, "seeds=0"),
    ({"evaluate": {"images": 3}}, "unknown key 'images'"),
    ({"evaluate": {"guidance_scales": 1.5}}, r"guidance_scales=1.5 .* write \[1.5\]"),
    ({"arms": None}, "has no 'arms'"),
    ({"settings": {"max_steps": -1}}, "arm 'GRPO': max_steps is not set"),
    ({"arms": {"GRPO": {}, "no": {"rollout_guidance_scale": 1.0}}}, "draw with different guidance"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_named_before_the_first_run(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_study(write(tmp_path, **changes))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_the_studies_that_ship_have_their_place_in_the_readme(file):
    study = read_study(file)
    head, rest = parts_of(file.parent / "README.md", study)
    assert len(study.seeds) >= 3 and study.question and head and mark(study, "end") not in rest


def test_an_unknown_measure_is_refused_before_anything_trains():
    with pytest.raises(ValueError, match="measure 'exactly' is none of shapes: exact, correct, inventory, extra"):
        benchmark_of(Measure(measure="exactly"))


def test_a_study_that_is_not_there(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["study", str(tmp_path / "none.yaml")])
    assert "there is no study" in capsys.readouterr().err


def result(key, exact, seed=0, reward=(), took=1.0):
    reports = {"1.5": {"exact": {"mean": exact, "error": 0.1}, "extra": {"mean": 0.25, "error": 0.1}}}
    return {"key": key, "seed": seed, "minutes": took, "history": {"reward": list(reward)}, "reports": reports}


def test_the_interval_is_students():
    # mean 2, deviation 1, three values: 4.3027 / sqrt(3) = 2.4841
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(2.48414, abs=1e-5)
    assert interval([2.0])[0] == 2.0 and math.isnan(interval([2.0])[1])


def test_differences_are_taken_seed_by_seed():
    # a seed that raises both arms cancels: 0.6 - 0.5 and 0.9 - 0.8; seed 2 has no partner
    assert differences({0: 0.6, 1: 0.9, 2: 0.1}, {0: 0.5, 1: 0.8}) == pytest.approx([0.1, 0.1])


def test_the_table():
    arms = [
        Arm("base model", {0: result("a", 0.4)}, trained=False),
        Arm("GRPO", {0: result("b", 0.5, reward=[0.1, 0.3]), 1: result("c", 0.7, 1, reward=[0.2, 0.4])}),
        Arm("GCPO", {0: result("d", 0.6, reward=[0.5, 0.5]), 1: result("e", 0.8, 1, reward=[0.5, 0.5])}),
        Arm("lost", {}, {0: "exit code 1: ValueError: no"}),
    ]
    lines = table(arms, "GRPO", "exact", ["1.5"]).splitlines()
    assert lines[0] == "| arm | runs | exact | minus GRPO | extra | training reward |"
    assert lines[2] == "| base model | 1 | 0.400 | – | 0.250 | – |"
    # mean 0.6; deviation 0.1414, t(1) = 12.706, half = 12.706 * 0.1414 / sqrt(2) = 1.271; rewards 0.2 and 0.3
    assert lines[3] == "| GRPO | 2 | 0.600 ± 1.271 | – | 0.250 ± 0.000 | 0.250 ± 0.635 |"
    assert lines[4] == "| GCPO | 2 | 0.700 ± 1.271 | +0.100 ± 0.000 | 0.250 ± 0.000 | 0.500 ± 0.000 |"
    assert lines[5] == "| lost | 0 | – | – | – | – |"
    assert lines[7] == "Failed: lost, seed 0: exit code 1: ValueError: no"
    assert minutes([*arms, arms[1]]) == 5.0  # a run that two arms share counts once


def test_the_front_is_what_nothing_beats_in_both():
    points = [(1.0, 1.0), (2.0, 0.5), (0.5, 2.0), (0.9, 0.9), (2.0, 0.7)]
    assert pareto_front(points) == [(0.5, 2.0), (1.0, 1.0), (2.0, 0.7)]


@pytest.mark.parametrize(
    ("printed", "words"),
    [
        ("INFO gcpo_trl: 1 process\nValueError: beta=-1\n", "ValueError: beta=-1"),
        ("gcpo study: there is no study\n[INFO] Running in WANDB offline mode\n\n", "gcpo study: there is no study"),
        ("RuntimeError: out of memory\nwandb: Run history\n", "RuntimeError: out of memory"),
        ("[INFO] and nothing else\n", "[INFO] and nothing else"),
        ("\n", "it printed nothing"),
    ],
)
def test_the_last_words_are_the_reason_and_not_what_libraries_say_in_passing(printed, words):
    assert last_words(printed) == words


def test_a_run_that_dies_leaves_its_last_words(tmp_path):
    study = read_study(write(tmp_path))
    slots, room = slots_of(2)
    assert slots == 2 and room.qsize() == 2
    run = study.arms["GCPO"][0]
    code = launch(tmp_path / "gone.yaml", run, tmp_path, room, [])  # the process is told of a study that is not there
    line = outcome(run, tmp_path, code)
    assert code == 2 and "failed, exit code 2" in line and "there is no study" in line
    assert room.qsize() == 2 and not result_file(tmp_path, run).exists()
    assert "there is no study" in json.loads((tmp_path / "runs" / f"{run.key}.failed").read_text())["why"]
