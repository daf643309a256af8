"""Benchmarks from model to report: the same bytes after a stop, GenEval end to end, and what is refused."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import reward_funcs.geneval
import reward_funcs.hpsv2
from gcpo_trl.cli.main import main
from gcpo_trl.evaluation import runner
from gcpo_trl.evaluation.benchmark import Benchmark, choose, rewards_judge
from gcpo_trl.evaluation.benchmarks import compbench, geneval
from gcpo_trl.evaluation.folder import Folder
from gcpo_trl.evaluation.scores import by_prompt, markdown, mean_and_error, mean_of_tasks, summarize
from gcpo_trl.prompts import load
from gcpo_trl.rollout import Sampling
from reward_funcs._geneval_detector import CLASSES, Instance

SAMPLING = Sampling(guidance_scale=3.0, batch_size=4)
CAPTIONS = [
    "a photo of a red circle",
    "a photo of a ring",
    "a photo of two bars",
    "a photo of a black heart",
    "a cross",
]


@pytest.fixture
def captions(tmp_path):
    """A file of five prompts."""
    file = tmp_path / "captions.txt"
    file.write_text("\n".join(CAPTIONS))
    return file


def command(tiny_janus, captions, out, *words):
    """Five prompts, two images each, in batches of 4, 4 and 2."""
    return [
        *("evaluate", "--benchmark", "prompts", "--prompts", str(captions), "--rewards", "tiny:redness"),
        *("--model", tiny_janus, "--batch-size", "4", "--images-per-prompt", "2", "--out", str(out), *words),
    ]


def contents(folder):
    """Every file under a folder, as bytes by name."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def mistake(capsys, *words):
    """What a command writes about a mistake of the user, who gets exit code 2."""
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 2
    return capsys.readouterr().err


# stopped and gone on


def test_a_stopped_run_goes_on_to_the_same_bytes(tiny_janus, captions, tmp_path, capsys, monkeypatch):
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    assert main(command(tiny_janus, captions, whole)) == 0

    save, saved = Folder.save, []

    def save_five(folder, index, *rest):
        if len(saved) == 5:
            raise KeyboardInterrupt
        saved.append(index)
        save(folder, index, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "save", save_five)
        assert main(command(tiny_janus, captions, stopped)) == 130
    assert saved == [0, 1, 2, 3, 4] and not stopped.exists()
    assert "the same command goes on" in capsys.readouterr().out

    drawn, sample = [], runner.sample

    def counted(policy, prompts, seed, indices, sampling):
        drawn.append(list(indices))
        return sample(policy, prompts, seed, indices, sampling)

    monkeypatch.setattr(runner, "sample", counted)
    (tmp_path / "stopped" / "00003" / "samples" / ".0000.png.9.part").parent.mkdir(parents=True)
    (tmp_path / "stopped" / "00003" / "samples" / ".0000.png.9.part").write_bytes(b"half a picture")
    assert main(command(tiny_janus, captions, stopped)) == 0
    assert drawn == [[4, 5, 6, 7], [8, 9]]  # the batch that was stopped is drawn whole, the first not at all
    assert stopped.read_bytes() == whole.read_bytes()
    assert stopped.with_suffix(".md").read_bytes() == whole.with_suffix(".md").read_bytes()
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")
    assert len(list((tmp_path / "stopped").rglob("*.png"))) == 10


def test_a_judge_that_broke_off_judges_the_same_pictures(tiny_janus, captions, tmp_path, monkeypatch):
    out = tmp_path / "report.json"
    with monkeypatch.context() as patched:
        patched.setattr(runner, "by_prompt", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main(command(tiny_janus, captions, out))
    monkeypatch.setattr(runner, "sample", None)  # nothing is drawn again
    assert main(command(tiny_janus, captions, out)) == 0
    report = json.loads(out.read_text())
    for index, row in enumerate(report["scores"]):
        for number, value in enumerate(row["values"]["redness"]):
            with Image.open(tmp_path / "report" / f"{index:05d}" / "samples" / f"{number:04d}.png") as picture:
                assert value == float(np.asarray(picture)[..., 0].mean()) / 255


def test_ranks_draw_the_pictures_that_one_process_draws(shared_policy, captions, tmp_path):
    benchmark = choose("prompts", [captions], ["tiny:redness"], images_per_prompt=2)
    for ranks in ([runner.Ranks()], [runner.Ranks(1, 2), runner.Ranks(0, 2)]):
        folder = Folder(tmp_path / str(len(ranks)), benchmark.images_per_prompt)
        drawn = []
        for one in ranks:
            runner.draw(shared_policy, benchmark, folder, SAMPLING, 7, one)
            drawn.append(len(list(folder.path.rglob("*.png"))))
        assert drawn == ([10] if len(ranks) == 1 else [4, 10])  # batches of 4, 4, 2: the second rank has the middle
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


def test_pictures_lie_where_geneval_looks(tiny_janus, captions, tmp_path):
    assert main(command(tiny_janus, captions, tmp_path / "a.json", "--limit", "2", "--seed", "3")) == 0
    kept = tmp_path / "a"
    names = {path.relative_to(kept).as_posix() for path in kept.rglob("*") if path.is_file()}
    samples = {f"0000{prompt}/samples/000{image}.png" for prompt in (0, 1) for image in (0, 1)}
    assert names == samples | {"settings.json", "00000/metadata.jsonl", "00001/metadata.jsonl"}
    # Two of five, evenly: 0 * 5 // 2 and 1 * 5 // 2.
    assert [json.loads((kept / f"0000{i}" / "metadata.jsonl").read_text())["prompt"] for i in (0, 1)] == [
        CAPTIONS[0],
        CAPTIONS[2],
    ]
    settings = json.loads((kept / "settings.json").read_text())
    report = json.loads((tmp_path / "a.json").read_text())
    assert settings == report["settings"]
    assert settings["seed"] == 1237 and settings["sampling"]["guidance_scale"] == 1.5 and settings["prompts"] == 2
    assert settings["versions"]["torch"] == torch.__version__ and "transformers" in settings["versions"]


# refused


def test_a_folder_of_other_settings_is_refused(tiny_janus, captions, tmp_path, capsys):
    out = tmp_path / "a.json"
    assert main(command(tiny_janus, captions, out, "--limit", "1")) == 0
    first = contents(tmp_path / "a")
    said = mistake(capsys, *command(tiny_janus, captions, out, "--limit", "1", "--seed", "1", "--guidance-scale", "2"))
    assert "drawn with other settings: sampling.guidance_scale 1.5, now 2.0; seed 1234, now 1235" in said
    assert "; weights" not in said and ": weights" not in said and "--force" in said
    assert "prompts_sha256" in mistake(capsys, *command(tiny_janus, captions, out, "--limit", "2"))
    assert contents(tmp_path / "a") == first
    assert main(command(tiny_janus, captions, out, "--limit", "1", "--seed", "1", "--force")) == 0
    second = contents(tmp_path / "a")
    assert second.keys() == first.keys() and second["00000/samples/0000.png"] != first["00000/samples/0000.png"]


def test_trained_weights_are_other_settings(policy):
    before = runner.fingerprint(policy.model)
    assert runner.fingerprint(policy.model) == before
    with torch.no_grad():
        policy.model.model.language_model.norm.weight[0] += 1e-3
    assert runner.fingerprint(policy.model) != before


def test_a_folder_that_is_no_runs_is_left_alone(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"x")
    for replace in (False, True):
        with pytest.raises(ValueError, match="exists and is no run's pictures"):
            Folder(tmp_path, 2).open({"seed": 1}, replace=replace)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_a_broken_picture_is_named(tmp_path):
    folder = Folder(tmp_path / "a", 2)
    folder.save(3, Image.new("RGB", (4, 4)), {"prompt": "p"})
    assert folder.read(3).size == (4, 4)
    data = folder.picture_path(3).read_bytes()
    folder.picture_path(3).write_bytes(data[: len(data) // 2])
    with pytest.raises(OSError, match=r"00001/samples/0001.png cannot be read .* delete it"):
        folder.read(3)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--benchmark", "genevall"], "--out NAME.json"),
        (["--benchmark", "genevall", "--out", "a.json"], "did you mean 'geneval'"),
        (["--benchmark", "prompts", "--out", "a.json"], "write --rewards NAME"),
        (["--benchmark", "prompts", "--rewards", "tiny:redness", "--out", "a.json"], "write --prompts FILE"),
        (["--benchmark", "hpsv2", "--prompts", "none.txt", "--out", "a.json"], "'none.txt' is not a file"),
        (["--benchmark", "drawbench", "--out", "a.json"], "drawbench needs one file of prompts, 0 given"),
        (["--benchmark", "compbench", "--out", "a.json"], "write --prompts color_val.txt"),
        (["--prompts", "a.txt"], "shapes has its own prompts"),
        (["--rewards", "shape"], "did you mean 'shapes'"),
        (["--rewards", "ocr"], "quote"),
        (["--rewards", "tiny:redness", "tiny:redness"], "two rewards are called 'redness'"),
        (["--images-per-prompt", "0"], "--images-per-prompt"),
        (["--limit", "0"], "--limit"),
        (["--out", "report.txt"], "no ending .json"),
        (["--max-failed", "1"], "below 1"),
        (["--compare", "one.json"], "at least two reports"),
        (["--compare", "none.json", "none.json"], "none.json"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_said_before_weights_load(capsys, words, says):
    said = mistake(capsys, "evaluate", "--model", "absent/model", *words)
    assert says in said and "Traceback" not in said and "absent/model" not in said


def test_missing_weights_of_the_judge_are_seen_first(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("GENEVAL_DETECTOR", str(tmp_path / "absent"))
    said = mistake(capsys, "evaluate", "--benchmark", "geneval", "--model", "absent/model", "--out", "a.json")
    assert "set GENEVAL_DETECTOR=DIR" in said


# benchmarks


@pytest.fixture
def sees_everything(monkeypatch):
    """A detector that is sure to see one of each class in the same place, and colours that are all red."""
    detector = types.SimpleNamespace(
        model=types.SimpleNamespace(config=types.SimpleNamespace(model_type="mask2former"))
    )

    def detect(loaded, images, floor):
        assert loaded is detector
        return [
            [Instance(name, 0.95, (2.0, 2.0, 20.0, 20.0), np.ones(image.size[::-1], dtype=bool)) for name in CLASSES]
            for image in images
        ]

    for module in (geneval, reward_funcs.geneval):
        monkeypatch.setattr(module, "load_detector", lambda *_: detector)
        monkeypatch.setattr(module, "load_color_classifier", lambda *_: None)
    monkeypatch.setattr(reward_funcs.geneval, "detect", detect)
    monkeypatch.setattr(reward_funcs.geneval, "classify_colors", lambda _, crops, name: ["red"] * len(crops))


def test_geneval_end_to_end(tiny_janus, tmp_path, capsys, monkeypatch, sees_everything):
    monkeypatch.setenv("GENEVAL_DETECTOR", "some/detector")
    out = tmp_path / "geneval.json"
    words = ["--model", tiny_janus, "--benchmark", "geneval", "--limit", "40", "--images-per-prompt", "1"]
    assert main(["evaluate", *words, "--out", str(out)]) == 0
    report = json.loads(out.read_text())

    official = load("geneval")
    asked = [json.loads(official[index * 553 // 40]["metadata"]) for index in range(40)]
    assert [row["prompt"] for row in report["scores"]] == [one["prompt"] for one in asked]
    # One of each class: objects are there, never two of one class; nothing lies beside another; all is red.
    red = [float(one["include"][0]["color"] == "red") for one in asked if one["tag"] == "colors"]
    assert 0 < sum(red) < len(red)
    expected = {"single_object": 1, "two_object": 1, "counting": 0, "position": 0, "color_attr": 0}
    expected["colors"] = sum(red) / len(red)
    assert {task: row["correct"]["mean"] for task, row in report["tasks"].items()} == pytest.approx(expected)
    assert report["overall"]["correct"]["mean"] == pytest.approx((2 + expected["colors"]) / 6)
    colors = report["tasks"]["colors"]["correct"]
    assert colors["error"] == pytest.approx(np.std(red, ddof=1) / math.sqrt(len(red)))
    assert report["label"] == "GenEval (HF Mask2Former)" and report["judge"]["detector"] == "some/detector"
    assert report["images"] == 40 and "GenEval (HF Mask2Former)" in out.with_suffix(".md").read_text()
    assert "| overall |" in capsys.readouterr().out
    # GenEval's own evaluator reads the same line that its file of prompts has.
    assert (tmp_path / "geneval" / "00007" / "metadata.jsonl").read_text() == json.dumps(asked[7]) + "\n"


def test_geneval_is_553_prompts_of_four_images(sees_everything):
    benchmark = choose("geneval")
    assert (len(benchmark.rows), benchmark.images_per_prompt, benchmark.tasks.count("colors")) == (553, 4, 94)
    assert geneval.label_of("rt_detr", "some/rtdetr") == "GenEval (some/rtdetr)"


def test_hpsv2_reads_styles_and_is_published_times_100(tmp_path, monkeypatch):
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {i}" for i in range(3)]))
    monkeypatch.setenv("HPSV2_VERSION", "2.0")
    monkeypatch.setattr(reward_funcs.hpsv2, "scores", lambda scorer, images, texts: [0.25] * len(texts))
    benchmark = choose("hpsv2", [tmp_path])
    assert list(dict.fromkeys(benchmark.tasks)) == ["anime", "concept-art", "paintings", "photo"]
    assert (benchmark.images_per_prompt, benchmark.groups_of, benchmark.label) == (1, 80, "HPSv2 (v2.0)")
    scores = [{"hpsv2": 0.25}] * 12
    summary = summarize(benchmark, by_prompt(benchmark, scores), most_failed=0)
    assert summary["overall"]["hpsv2"]["mean"] == 25.0
    assert "group_std" not in summary["tasks"]["photo"]["hpsv2"]  # three are no group of 80


def test_drawbench_is_the_mean_of_all_prompts(tmp_path, monkeypatch):
    file = tmp_path / "drawbench.csv"
    file.write_text("Prompts,Category\na cat,Colors\na dog,Colors\na cow,Colors\ntwo cats,Counting\n")
    monkeypatch.setattr(reward_funcs.hpsv2, "scores", lambda scorer, images, texts: [0.2] * len(texts))
    benchmark = choose("drawbench", [file])
    assert benchmark.tasks == ["Colors", "Colors", "Colors", "Counting"]
    rows = by_prompt(benchmark, [{"hpsv2": value} for value in (0.1, 0.2, 0.3, 0.6)])
    # (.1 + .2 + .3 + .6) / 4 = .3, while the mean of the categories were (.2 + .6) / 2 = .4
    assert summarize(benchmark, rows, 0)["overall"]["hpsv2"]["mean"] == pytest.approx(30.0)


def test_compbench_has_a_judge_a_file(tmp_path, monkeypatch):
    for name in ("color_val", "numeracy_val"):
        (tmp_path / f"{name}.txt").write_text("a red cat\nfour dogs\n")
    monkeypatch.setitem(compbench.REWARDS, "color", "tiny:redness")
    monkeypatch.setitem(compbench.REWARDS, "numeracy", lambda prompts, completions, **_: [0.5] * len(prompts))
    files = [tmp_path / "color_val.txt", tmp_path / "numeracy_val.txt"]
    benchmark = choose("compbench", files, images_per_prompt=1)
    assert benchmark.tasks == ["color_val"] * 2 + ["numeracy_val"] * 2
    white = Image.new("RGB", (8, 8), "white")
    assert benchmark.judges["color_val"](benchmark.rows[:2], [white] * 2) == {"redness": [1.0, 1.0]}
    scores = [{"redness": 0.2}, {"redness": 0.4}, {"<lambda>": 0.5}, {"<lambda>": 0.5}]
    summary = summarize(benchmark, by_prompt(benchmark, scores), 0)
    assert summary["overall"] == {}  # no measure has both tasks
    table = markdown(summary, {}).splitlines()
    assert table[2:] == [
        "| color_val | 0.300 ± 0.100 | – |",
        "| numeracy_val | – | 0.500 ± 0.000 |",
        "| overall | – | – |",
    ]


def test_compbench_rewards_by_name():
    names = ["color_val", "non_spatial_val", "spatial", "complex_val_action", "texture_val"]
    rewards = [compbench.reward_of(types.SimpleNamespace(stem=name, name=name)) for name in names]
    assert rewards == ["blip_vqa", compbench.clip_b32, "spatial_2d", "compbench_3in1", "blip_vqa"]
    with pytest.raises(ValueError, match=r"3d_spatial_val\.txt says no task"):
        compbench.reward_of(types.SimpleNamespace(stem="3d_spatial_val", name="3d_spatial_val.txt"))


def test_columns_reach_the_reward_and_asynchronous_ones_are_awaited():
    async def later(prompts, completions, color, **columns):
        return [f"{prompt}{c}".count("a") for prompt, c in zip(prompts, color, strict=True)]

    rows = [{"prompt": "a cat", "color": "black"}, {"prompt": "dog", "color": "red"}]
    judge, labels = rewards_judge([later], rows)
    assert judge(rows, [None, None]) == {"later": [3.0, 0.0]} and labels == ["later"]


# sums


def made(tasks, images_per_prompt=1, **more):
    """A benchmark whose prompts are numbered."""
    rows = [{"prompt": str(index)} for index in range(len(tasks))]
    return Benchmark("made", "made", rows, tasks, {}, images_per_prompt, **more)


def test_errors_are_over_prompts_and_overall_over_tasks():
    # Prompt means 0, 1 | 1: task means 1/2 and 1, errors sqrt(1/2)/sqrt(2) = 1/2 and 0; overall 3/4, error (1/2)/2.
    scores = [{"x": value} for value in (0, 0, 1, 1, 1, 1)]
    benchmark = made(["a", "a", "b"], images_per_prompt=2)
    summary = summarize(benchmark, by_prompt(benchmark, scores), 0)
    assert summary["tasks"]["a"]["x"] == {"mean": 0.5, "error": 0.5, "scored": 4, "failed": 0}
    assert summary["overall"]["x"] == {"mean": 0.75, "error": 0.25}


def test_weights_of_tasks():
    # (3 * 1 + 1 * 5) / 4 = 2; sqrt((3 * .4)^2 + (1 * 1.6)^2) / 4 = 2 / 4
    overall = mean_of_tasks([{"mean": 1, "error": 0.4}, {"mean": 5, "error": 1.6}], [3, 1])
    assert overall == pytest.approx({"mean": 2, "error": 0.5})
    assert mean_and_error([4.0]) == {"mean": 4.0, "error": 0.0}


def test_a_picture_without_a_score_is_counted_and_not_zero():
    # The first prompt keeps one picture of two: mean 1, not 1/2; the second loses both and is left out.
    benchmark = made(["a", "a", "a"], images_per_prompt=2)
    scores = [{"x": value} for value in (1.0, None, None, None, 0.0, 1.0)]
    rows = by_prompt(benchmark, scores)
    summary = summarize(benchmark, rows, most_failed=0.5)
    assert_close(torch.tensor(summary["tasks"]["a"]["x"]["mean"]), torch.tensor(0.75), rtol=0, atol=0)
    assert (summary["tasks"]["a"]["x"]["scored"], summary["tasks"]["a"]["x"]["failed"]) == (3, 3)
    with pytest.raises(RuntimeError, match="x gave no value for 3 of 6 pictures of a, over 40%"):
        summarize(benchmark, rows, most_failed=0.4)
    with pytest.raises(RuntimeError, match="no value for 2 of 2"):
        summarize(made(["a"], 2), by_prompt(made(["a"], 2), [{"x": None}] * 2), most_failed=0.99)


def test_deviation_of_group_means():
    # Groups of 2: (1, 3), (5, 7), and a 9 that fills none: means 2 and 6, deviation by n: 2; times 10.
    benchmark = made(["a"] * 5, groups_of=2, scale=10.0)
    summary = summarize(benchmark, by_prompt(benchmark, [{"x": v} for v in (1.0, 3.0, 5.0, 7.0, 9.0)]), 0)
    assert summary["tasks"]["a"]["x"]["group_std"] == 20.0 and summary["tasks"]["a"]["x"]["mean"] == 50.0
    assert "| a | 50.000 ± 14.142 | 20.0000 |" in markdown(summary, {})
    ungrouped = dataclasses.replace(benchmark, groups_of=0)
    assert "group_std" not in summarize(ungrouped, by_prompt(ungrouped, [{"x": 1.0}] * 5), 0)["tasks"]["a"]["x"]
