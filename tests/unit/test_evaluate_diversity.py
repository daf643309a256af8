"""Diversity of pictures: features by hand, reports of `gcpo evaluate --diversity`, and a policy that collapsed."""

import json
import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import skimage
import tiny_clip
import torch
from fetch_weights import weights_file
from PIL import Image

from gcpo_trl.cli.main import main
from gcpo_trl.evaluation import diversity_report, runner, shapes
from gcpo_trl.evaluation.compare import compare, read_reports
from gcpo_trl.evaluation.diversity import Drawn, Gauge, choose_gauge, diversity, measure, summarize_groups
from gcpo_trl.evaluation.features import clip, histogram
from gcpo_trl.evaluation.folder import Folder
from gcpo_trl.evaluation.ranks import Ranks
from gcpo_trl.policies.janus import load
from gcpo_trl.rollout import Sampling
from gcpo_trl.shapes.build import CHECKPOINT
from gcpo_trl.shapes.grammar import TASKS, split_specs
from reward_funcs._clip import pixel_values
from reward_funcs._lpips import load_lpips, lpips_distance
from reward_funcs.reconstruction import pixels

PHOTOS = Path(skimage.__file__).parent / "data"
BLACK, WHITE, RED = (0, 0, 0), (255, 255, 255), (255, 0, 0)


def plain(color, size=(36, 36)):
    return Image.new("RGB", size, color)


def board(*colors):
    """A picture of 3 x 3 pixels, a cell each."""
    return Image.fromarray(np.array(colors, dtype=np.uint8).reshape(3, 3, 3))


def cosine(one, other):
    first, second = histogram.features([one, other])
    return (first @ second).item()


# features


def test_histogram_is_the_share_of_colour_in_common():
    assert cosine(plain(BLACK), plain(BLACK)) == pytest.approx(1, abs=1e-12)
    assert cosine(plain(BLACK), plain(WHITE)) == 0
    # Six of nine cells are alike.
    assert cosine(board(*[BLACK] * 9), board(*[BLACK] * 6, *[RED] * 3)) == pytest.approx(6 / 9, abs=1e-12)
    # The same colours in other places: a black and a white half exchanged have no cell but the middle row in common.
    upper, lower = board(*[BLACK] * 3, *[RED] * 3, *[WHITE] * 3), board(*[WHITE] * 3, *[RED] * 3, *[BLACK] * 3)
    assert cosine(upper, lower) == pytest.approx(1 / 3, abs=1e-12)
    # 17 of the 85 from one level to the next: .8 of each channel counts as black, sqrt(.8^3) of the picture.
    assert cosine(plain(BLACK), plain((17, 17, 17))) == pytest.approx(math.sqrt(0.8**3), abs=1e-12)


def test_histogram_takes_pictures_of_any_size_and_says_which_are_too_small():
    wide = plain(RED, (301, 40))
    assert cosine(wide, plain(RED)) == pytest.approx(1, abs=1e-12)
    assert histogram.features([wide]).norm().item() == pytest.approx(1, abs=1e-12)
    with pytest.raises(ValueError, match="a picture of 2 x 5 pixels has no 3 x 3 cells"):
        histogram.features([plain(RED, (2, 5))])


def test_clip_features_are_those_of_the_model(tmp_path, monkeypatch):
    model = tiny_clip.save_clip(tmp_path)
    monkeypatch.setenv("CLIPSCORE_MODEL", str(tmp_path))
    pictures = tiny_clip.pictures(3)
    stacked = torch.stack([pixel_values(picture, tiny_clip.SIDE) for picture in pictures])
    with torch.no_grad():
        expected = model.get_image_features(pixel_values=stacked).pooler_output
    torch.testing.assert_close(clip.features(pictures), expected, rtol=0, atol=1e-5)
    unit = torch.nn.functional.normalize(expected.double(), dim=1)
    distance = sum(1 - (unit[i] @ unit[j]).item() for i, j in combinations(range(3), 2)) / 3
    values = diversity([pictures], "clip")
    assert values["pairwise_distance"]["mean"] == pytest.approx(distance, abs=1e-6)
    assert choose_gauge("clip", 2).label == f"CLIP {tmp_path}"


# groups


def test_means_and_errors_are_over_groups():
    # Vendi 1 and 2, distances 0 and 1: means 3/2 and 1/2, errors sqrt(1/2) / sqrt(2) = 1/2.
    found = diversity([[plain(RED)] * 2, [plain(BLACK), plain(WHITE)]])
    assert found["vendi"] == pytest.approx({"mean": 1.5, "error": 0.5})
    assert found["pairwise_distance"] == pytest.approx({"mean": 0.5, "error": 0.5})
    assert set(found) == {"vendi", "pairwise_distance"}


def test_groups_may_differ_in_size_and_features_may_be_a_function():
    def redness(pictures):
        return torch.tensor([[1.0, 0.0] if p.getpixel((0, 0)) == RED else [0.0, 2.0] for p in pictures])

    # Of three, two alike: one pair of three is alike, eigenvalues 2/3 and 1/3.
    found = diversity([[plain(RED), plain(WHITE), plain(RED)]], redness)
    assert found["pairwise_distance"]["mean"] == pytest.approx(2 / 3)
    assert found["vendi"]["mean"] == pytest.approx(3 / 2 ** (2 / 3))
    values = measure([[Drawn(plain(RED))] * 2, [Drawn(plain(c)) for c in (RED, WHITE, RED)]], Gauge(redness, ""))
    assert [value["pairwise_distance"] for value in values] == pytest.approx([0, 2 / 3])


def test_tokens_are_measured_where_every_picture_has_them():
    red, gauge = plain(RED), Gauge(histogram.features, "")
    # 1 of 2 positions differs in the one pair; entropies 1 and 2.
    (both,) = measure([[Drawn(red, [1, 5], 1.0), Drawn(red, [1, 6], 2.0)]], gauge)
    assert (both["disagreement"], both["entropy"]) == (0.5, 1.5)
    (one,) = measure([[Drawn(red, [1, 5], 1.0), Drawn(red)]], gauge)
    assert set(one) == {"vendi", "pairwise_distance"}
    # A measure that some prompt lacks has no mean over prompts.
    tasks, overall = summarize_groups([both, one], ["a", "a"])
    assert set(overall) == set(tasks["a"]) == {"vendi", "pairwise_distance"}


def test_overall_is_over_tasks_or_over_prompts():
    values = [{"vendi": 1.0}, {"vendi": 2.0}, {"vendi": 3.0}]
    # Task means 3/2 and 3; all prompts 2.
    assert summarize_groups(values, ["a", "a", "b"])[1]["vendi"]["mean"] == 2.25
    tasks, overall = summarize_groups(values, ["a", "a", "b"], by_prompts=True)
    assert overall["vendi"]["mean"] == 2 and tasks["a"]["vendi"] == pytest.approx({"mean": 1.5, "error": 0.5})


def test_lpips_is_the_mean_over_the_pairs():
    network = load_lpips(str(weights_file("stlpips_alex.pth")), "", "cpu")
    names = ("astronaut.png", "coffee.png", "chelsea.png")
    group = [Image.open(PHOTOS / name).convert("RGB").resize((64, 48)) for name in names]
    pairs = [lpips_distance(network, pixels(a)[None], pixels(b)[None]).item() for a, b in combinations(group, 2)]
    found = diversity([group], lpips=network)["lpips"]["mean"]
    assert found == pytest.approx(sum(pairs) / 3, abs=1e-5) and found > 0.3
    assert diversity([[group[0]] * 3], lpips=network)["lpips"]["mean"] == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="pictures of 36 x 36, 64 x 48 pixels; LPIPS compares pictures of one size"):
        diversity([[group[0], plain(RED)]], lpips=network)
    with pytest.raises(ValueError, match="at least 32 a side: unset LPIPS_WEIGHTS"):
        diversity([[plain(RED, (31, 40))] * 2], lpips=network)


@pytest.mark.parametrize(
    ("groups", "features", "says"),
    [
        ([], "histogram", "no groups of pictures"),
        ([[plain(RED)]], "histogram", "groups of 1 make no pairs"),
        ([[plain(RED)] * 2], "histogramm", "did you mean 'histogram'"),
        ([[plain(RED)] * 2], lambda pictures: torch.ones(2), r"shape \(2,\); return \(pictures, dim\)"),
        ([[plain(RED)] * 2], lambda pictures: torch.tensor([[1.0], [0.0]]), "1 of 2 .* first of picture 1"),
    ],
    ids=["none", "alone", "unknown", "shape", "zero"],
)
def test_mistakes_of_a_caller(groups, features, says):
    with pytest.raises(ValueError, match=says):
        diversity(groups, features)


# gcpo evaluate --diversity


def command(tiny_janus, folder, *words, prompts=("a photo of a red circle", "a ring", "a cross")):
    """Three prompts, three images each, in batches of 4, 4 and 1."""
    captions = folder / "captions.txt"
    captions.write_text("\n".join(prompts))
    return [
        *("evaluate", "--benchmark", "prompts", "--prompts", str(captions), "--rewards", "tiny:redness"),
        *("--model", tiny_janus, "--batch-size", "4", "--images-per-prompt", "3", *map(str, words)),
    ]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_report_has_diversity_and_can_have_it_afterwards(tiny_janus, shared_policy, tmp_path, capsys, monkeypatch):
    together, later = tmp_path / "together.json", tmp_path / "later.json"
    assert main(command(tiny_janus, tmp_path, "--diversity", "--out", together)) == 0
    said = capsys.readouterr().out
    assert "| vendi | pairwise_distance | disagreement | entropy |" in said
    assert "features: histogram (64 colours in 3 x 3 cells)\nlpips: not measured; set LPIPS_WEIGHTS" in said
    assert main(command(tiny_janus, tmp_path, "--out", later)) == 0
    without = json.loads(later.read_text())
    assert "diversity" not in without and "vendi" not in without["overall"]
    monkeypatch.setattr(runner, "sample", None)  # nothing is drawn again
    assert main(command(tiny_janus, tmp_path, "--diversity", "--out", later)) == 0
    assert later.read_bytes() == together.read_bytes()
    assert later.with_suffix(".md").read_bytes() == together.with_suffix(".md").read_bytes()
    assert contents(tmp_path / "later") == contents(tmp_path / "together")

    report = json.loads(together.read_text())
    assert report["overall"]["redness"] == without["overall"]["redness"]
    expected = []
    for index, row in enumerate(report["scores"]):
        folder = tmp_path / "together" / f"{index:05d}" / "samples"
        pictures = [Image.open(folder / f"000{i}.png") for i in range(3)]
        texts = [json.loads(picture.text["gcpo_trl"]) for picture in pictures]
        tokens = [np.array(text["tokens"]) for text in texts]
        decoded = shared_policy.decode(torch.tensor([text["tokens"] for text in texts]))
        assert [picture.tobytes() for picture in pictures] == [picture.tobytes() for picture in decoded]
        cosines = [cosine(a, b) for a, b in combinations(pictures, 2)]
        assert row["diversity"]["pairwise_distance"] == pytest.approx(1 - sum(cosines) / 3, abs=1e-9)
        differ = [(a != b).mean() for a, b in combinations(tokens, 2)]
        assert len(tokens[0]) == 81 and row["diversity"]["disagreement"] == pytest.approx(sum(differ) / 3, abs=1e-6)
        expected.append(sum(text["entropy"] for text in texts) / 3)
    assert [row["diversity"]["entropy"] for row in report["scores"]] == pytest.approx(expected, abs=1e-12)
    overall = report["overall"]["entropy"]
    assert overall["mean"] == pytest.approx(np.mean(expected))
    assert overall["error"] == pytest.approx(np.std(expected, ddof=1) / math.sqrt(3))


def test_a_stopped_run_goes_on_to_the_same_report(tiny_janus, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole.json", tmp_path / "stopped.json"
    assert main(command(tiny_janus, tmp_path, "--diversity", "--out", whole)) == 0
    save, saved = Folder.save, []

    def save_five(folder, *rest):
        if len(saved) == 5:
            raise KeyboardInterrupt
        saved.append(save(folder, *rest))

    with monkeypatch.context() as patched:
        patched.setattr(Folder, "save", save_five)
        assert main(command(tiny_janus, tmp_path, "--diversity", "--out", stopped)) == 130
    assert main(command(tiny_janus, tmp_path, "--diversity", "--out", stopped)) == 0
    assert stopped.read_bytes() == whole.read_bytes() and contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_pictures_without_their_tokens_are_measured_by_what_they_show(tiny_janus, tmp_path):
    out = tmp_path / "a.json"
    assert main(command(tiny_janus, tmp_path, "--out", out)) == 0
    picture = tmp_path / "a" / "00001" / "samples" / "0002.png"
    with Image.open(picture) as kept:
        kept.convert("RGB").save(picture)  # another program's: no text chunk
    assert main(command(tiny_janus, tmp_path, "--diversity", "--out", out)) == 0
    report = json.loads(out.read_text())
    assert {"vendi", "pairwise_distance"} == set(report["scores"][0]["diversity"])
    assert "disagreement" not in report["overall"] and "draw them anew with --force" in report["diversity"]["tokens"]
    assert "tokens: not measured; some pictures do not hold" in out.with_suffix(".md").read_text()


def test_lpips_joins_where_its_weights_are_named(tiny_janus, tmp_path, monkeypatch):
    monkeypatch.setenv("LPIPS_WEIGHTS", str(weights_file("stlpips_alex.pth")))
    assert main(command(tiny_janus, tmp_path, "--diversity", "--out", tmp_path / "a.json")) == 0
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["overall"]["lpips"]["mean"] > 0 and report["diversity"]["lpips"] == "LPIPS (alex, shift-tolerant)"


def test_two_ranks_measure_what_one_does(shared_policy, tmp_path, monkeypatch):
    benchmark = runner.Benchmark(
        "made", "made", [{"prompt": str(i)} for i in range(5)], ["a"] * 5, {}, 2, gauge=choose_gauge("histogram", 2)
    )
    folder = Folder(tmp_path, 2)
    runner.draw(shared_policy, benchmark, folder, Sampling(guidance_scale=3.0), 7, Ranks())
    monkeypatch.setattr(diversity_report, "AT_ONCE", 4)  # parts of two prompts
    alone, parts = diversity_report.measure_folder(benchmark, folder, Ranks()), []
    monkeypatch.setattr(diversity_report, "gather_object", lambda own: parts.extend(own) or [*parts])
    with pytest.raises(KeyError):  # the second rank's share alone: prompts 2 and 3
        diversity_report.measure_folder(benchmark, folder, Ranks(1, 2))
    assert [prompt for prompt, _ in parts] == [2, 3]
    assert diversity_report.measure_folder(benchmark, folder, Ranks(0, 2)) == alone


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--images-per-prompt", "1"], "there is 1; write --images-per-prompt 2 or more"),
        (["clp"], "did you mean 'clip'"),
        (["clip"], "set CLIPSCORE_MODEL=DIR"),
        (["tiny:nothing"], "has no 'nothing'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_said_before_weights_load(capsys, monkeypatch, words, says):
    monkeypatch.setenv("CLIPSCORE_MODEL", "absent/clip")
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--model", "absent/model", "--diversity", *words])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and says in said and "Traceback" not in said and "absent/model" not in said


def test_runs_are_compared_in_diversity_too(tmp_path):
    def report(name, values, diverse, about="histogram"):
        rows = [
            {"prompt": str(i), "task": "a", "values": {"x": [value]}} | ({"diversity": {"vendi": v}} if about else {})
            for i, (value, v) in enumerate(zip(values, diverse, strict=True))
        ]
        made = {"benchmark": "b", "label": "l", "scale": 100.0, "overall_over": "tasks", "scores": rows}
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(made | ({"diversity": {"features": about}} if about else {})))
        return file

    files = [report("base", [0.1, 0.3], [2.0, 3.0]), report("trained", [0.2, 0.4], [1.5, 2.5])]
    found = compare(read_reports(files))
    # The judge's measure is on the scale of the benchmark, diversity is not.
    assert found["x"]["overall"].means == pytest.approx([20, 30])
    assert found["vendi"]["overall"].means == pytest.approx([2.5, 2.0])
    assert found["vendi"]["overall"].intervals[1] == pytest.approx([-0.5, -0.5])
    for about in ("CLIP x", None):
        with pytest.raises(ValueError, match=r"other.json has diversity .* the same command with --diversity adds it"):
            read_reports([files[0], report("other", [0.2, 0.4], [1.5, 2.5], about)])


# the shapes world


@pytest.fixture(scope="module")
def shipped():
    """The base policy that ships with the package."""
    return load(str(CHECKPOINT), dtype=torch.float32)


SPECS = [split_specs(task)[1][0] for task in TASKS]
NAMES = ("vendi", "pairwise_distance", "disagreement", "entropy")


def evaluated(policy, **changes):
    sampling = Sampling(guidance_scale=1.5, temperature=changes.pop("temperature", 1.0))
    return shapes.evaluate(policy, sampling, SPECS, images_per_prompt=6, diversity=True, **changes)


def test_a_collapsed_policy_is_lower_on_every_measure(shipped):
    base, cold = evaluated(shipped), evaluated(shipped, temperature=0.1)
    assert base.features == "histogram (64 colours in 3 x 3 cells)"
    for name in NAMES:
        assert base.overall[name]["mean"] > 2 * max(base.overall[name]["error"], 1e-3)
        assert cold.overall[name]["mean"] < base.overall[name]["mean"] - 2 * base.overall[name]["error"], name
        assert base.overall[name]["mean"] == pytest.approx(np.mean([base.tasks[t][name]["mean"] for t in TASKS]))
    assert "| vendi | pairwise_distance | disagreement | entropy |" in base.table()
    judged = shapes.evaluate(shipped, Sampling(guidance_scale=1.5), SPECS, images_per_prompt=6)
    assert judged.features == "" and set(judged.overall) == set(shapes.MEASURES)
    assert {m: base.overall[m] for m in shapes.MEASURES} == judged.overall


def test_a_policy_that_draws_one_image_has_no_diversity(shipped, monkeypatch):
    sample = shapes.sample

    def same(policy, prompts, seed, indices, sampling):
        return sample(policy, prompts, seed, [0] * len(indices), sampling)

    monkeypatch.setattr(shapes, "sample", same)
    found = evaluated(shipped).overall
    assert found["vendi"]["mean"] == pytest.approx(1, abs=1e-9)
    assert found["pairwise_distance"]["mean"] == pytest.approx(0, abs=1e-9)
    assert found["disagreement"]["mean"] == 0


def test_two_ranks_evaluate_what_one_does(shipped, monkeypatch):
    parts = []
    monkeypatch.setattr(shapes, "gather_object", lambda own: parts.extend(own) or [*parts])
    with pytest.raises(ValueError, match=r"shorter|longer"):  # the second rank's share alone is no whole evaluation
        evaluated(shipped, rank=1, world=2)
    both = evaluated(shipped, rank=0, world=2)
    alone = evaluated(shipped)
    for name in NAMES:
        assert both.overall[name] == pytest.approx(alone.overall[name], abs=1e-6)


def test_one_image_a_prompt_is_refused(shipped):
    with pytest.raises(ValueError, match="images_per_prompt=1 leaves nothing to compare"):
        shapes.evaluate(shipped, Sampling(), SPECS, images_per_prompt=1, diversity=True)
