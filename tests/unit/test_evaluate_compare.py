"""Runs compared: paired bootstrap over prompts, in numbers a reader can redo."""

import json

import numpy as np
import pytest

from gcpo_trl.cli.main import main
from gcpo_trl.evaluation.compare import bootstrap, compare, comparison_table


def report(values, tasks=None, **more):
    """A report whose prompts have these values of a picture each."""
    tasks = tasks or ["a"] * len(values)
    rows = [
        {"prompt": str(i), "task": task, "values": {"x": value if isinstance(value, list) else [value]}}
        for i, (value, task) in enumerate(zip(values, tasks, strict=True))
    ]
    return {"benchmark": "b", "label": "l", "scale": 1.0, "overall_over": "tasks", "scores": rows} | more


def test_the_same_gain_everywhere_is_certain():
    # Unpaired, values from 0 to 8 would leave an interval of several units.
    found = compare([report([0.0, 4.0, 8.0]), report([1.0, 5.0, 9.0])])["x"]["overall"]
    assert found.means == pytest.approx([4, 5])
    assert found.intervals[1] == pytest.approx([1, 1]) and found.intervals[0] == pytest.approx([0, 0])


def test_two_prompts_have_three_resamples():
    # Differences 0 and 1: the mean of a resample is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4, so 95% reach from 0 to 1.
    found = compare([report([0.0, 0.0]), report([0.0, 1.0])])["x"]["a"]
    assert found.means == pytest.approx([0, 0.5])
    assert found.intervals[1].tolist() == [0, 1]
    means = bootstrap(np.array([[0.0, 1.0]]), np.random.default_rng(0), 10_000)[0]
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    assert counts / 10_000 == pytest.approx([0.25, 0.5, 0.25], abs=0.02)  # four standard errors: 4 * .005


def test_the_interval_of_many_prompts_is_that_of_the_normal_distribution():
    gains = np.random.default_rng(1).normal(0.3, 1.0, 400)
    found = compare([report([0.0] * 400), report(gains.tolist())])["x"]["a"]
    half = 1.96 * gains.std() / 20  # the deviation by n, over the root of 400
    assert found.intervals[1] == pytest.approx([gains.mean() - half, gains.mean() + half], abs=0.01)


def test_overall_is_the_mean_of_tasks_or_of_prompts():
    # Task a: three prompts gain 1; task b: one gains 5. (1 + 5) / 2 = 3; (1 + 1 + 1 + 5) / 4 = 2.
    tasks = ["a", "a", "b", "a"]
    for over, mean in (("tasks", 3), ("prompts", 2)):
        reports = [report(values, tasks, overall_over=over) for values in ([0.0] * 4, [1.0, 1.0, 5.0, 1.0])]
        found = compare(reports)["x"]
        assert found["overall"].means == pytest.approx([0, mean])
        assert found["overall"].intervals[1] == pytest.approx([mean, mean])
        assert list(found) == ["a", "b", "overall"]


def test_a_prompt_without_a_value_in_one_run_is_left_out_of_all():
    # Of prompts 1, 2, 3 the second has no value in the other run; pictures of one prompt are averaged: (2 + 4) / 2 = 3.
    found = compare([report([1.0, 9.0, [2.0, 4.0]]), report([1.0, None, [3.0, None]])])["x"]["a"]
    assert (found.prompts, found.left_out) == (2, 1)
    assert found.means == pytest.approx([2, 2])


def test_the_table_names_runs_and_is_scaled():
    reports = [report([0.1, 0.3], scale=100.0), report([0.2, 0.4], scale=100.0), report([0.1, 0.3], scale=100.0)]
    table = comparison_table(["base", "gcpo", "grpo"], compare(reports)).splitlines()
    assert table[0] == "| x | prompts | base | gcpo | difference | grpo | difference |"
    assert table[1].count("---") == 7
    assert table[2] == "| a | 2 | 20.000 | 30.000 | +10.000 [+10.000, +10.000] | 20.000 | +0.000 [+0.000, +0.000] |"
    assert table[3].startswith("| overall | 2 |")
    assert table[-1] == "Differences from base, 95% paired bootstrap over prompts, 10,000 resamples, seed 0"


def written(folder, **reports):
    for name, content in reports.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return [str(folder / f"{name}.json") for name in reports]


def test_the_command_prints_and_writes_the_same_table_every_time(tmp_path, capsys):
    generator = np.random.default_rng(0)
    files = written(tmp_path, one=report(generator.random(20).tolist()), two=report(generator.random(20).tolist()))
    said = []
    for _ in range(2):
        assert main(["evaluate", "--compare", *files, "--out", str(tmp_path / "table.md")]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and said[0].startswith((tmp_path / "table.md").read_text())
    assert "| x | prompts | one | two | difference |" in said[0]


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (report([1.0, 1.0], label="m"), "has label 'm'"),
        (report([1.0, 1.0], ["a", "c"]), "other prompts than"),
        (report([1.0]), "other prompts than"),
        ({"before": 1}, "no report with the scores of its pictures"),
        ([1], "no report with the scores of its pictures"),
    ],
)
def test_runs_that_do_not_compare_are_refused(tmp_path, capsys, other, says):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--compare", *written(tmp_path, one=report([0.0, 1.0]), two=other)])
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_other_measures_do_not_compare(tmp_path, capsys):
    other = report([1.0, 1.0])
    for row in other["scores"]:
        row["values"] = {"y": row["values"]["x"]}
    with pytest.raises(SystemExit):
        main(["evaluate", "--compare", *written(tmp_path, one=report([0.0, 1.0]), two=other)])
    assert "other measures than" in capsys.readouterr().err
