"""Seeing what a run learns: grids of its pictures, in files and trackers, and the held-out look beside training."""

import importlib
import io
import os
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from tiny import PROMPTS, digits, janus_trainer, record, redness, settings, shape_prompts, text_prompts
from torch.testing import assert_close

from gcpo_trl import GCPOTrainer, HeldOutCallback
from gcpo_trl.monitoring.held_out import sharpness
from gcpo_trl.rollout import Sampling, sample

# Two groups of two, a line each: two cells of 294 x 172 in a line, 6 apart, and a legend of three strategies.
SHEET = (6 + 2 * 300, 6 + 2 * 178 + 16 * 4)


@pytest.fixture(scope="module")
def seen(tiny_janus, tmp_path_factory):
    """A run of two steps that logs its images and completions to every tracker, none of which needs the network."""
    for name, extra in (("wandb", "wandb"), ("tensorboard", "trackers"), ("trackio", "trackers")):
        pytest.importorskip(name, reason=f"install gcpo_trl[{extra}]")
    folder = tmp_path_factory.mktemp("seen")
    environment = {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(folder),
        "WANDB_SILENT": "true",
        "TENSORBOARD_LOGGING_DIR": str(folder / "events"),
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in environment.items():
            patch.setenv(key, value)
        changes = {"log_images": 1, "log_completions": True, "max_steps": 2, "project": "seen"}
        trackers = ["wandb", "tensorboard", "trackio"]
        trainer = janus_trainer(tiny_janus, folder / "out", reward=digits, report_to=trackers, **changes)
        trainer.train()
        importlib.import_module("wandb").finish()
        rows = trackio_rows("seen")
    files = sorted((folder / "out" / "images").iterdir())
    grids = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    return SimpleNamespace(folder=folder, out=folder / "out", trainer=trainer, rows=rows, files=files, grids=grids)


def trackio_rows(project):
    """All that trackio has of a project's only run, in the order it was logged; tests/conftest.py says where."""
    storage = importlib.import_module("trackio.sqlite_storage").SQLiteStorage
    (run,) = storage.get_runs(project)
    return storage.get_logs(project, run)


# grids


def test_a_grid_is_written_every_step_and_nothing_else(seen):
    assert [file.name for file in seen.files] == ["step-000001.png", "step-000002.png"]
    assert [grid.shape for grid in seen.grids] == [(SHEET[1], SHEET[0], 3)] * 2
    assert not np.array_equal(*seen.grids)


def test_a_grid_shows_the_images_of_its_step(seen):
    # The last images are still there; their first one is 36 pixels wide, so drawn four times as large.
    tile = seen.grids[1][6 + 28 : 6 + 28 + 144, 6 : 6 + 144]
    assert np.array_equal(tile[::4, ::4], np.asarray(seen.trainer._images[0]))


def test_wandb_holds_the_grids(seen):
    media = sorted(seen.folder.glob("wandb/offline-run-*/files/media/images/gcpo/images_*.png"))
    assert len(media) == 2
    found, expected = ([np.asarray(page).tobytes() for page in pages] for pages in (map(Image.open, media), seen.grids))
    assert sorted(found) == sorted(expected)


def test_tensorboard_holds_the_grids_at_their_steps(seen):
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(seen.folder / "events"))
    events.Reload()
    images = events.Images("gcpo/images")
    assert [image.step for image in images] == [1, 2]
    for image, grid in zip(images, seen.grids, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(image.encoded_image_string))), grid)
    logged = [entry["gcpo/weight/mean"] for entry in seen.trainer.state.log_history if "loss" in entry]
    scalars = events.Scalars("train/gcpo/weight/mean")
    assert [scalar.step for scalar in scalars] == [1, 2]
    assert_close([scalar.value for scalar in scalars], logged, rtol=1e-6, atol=0)  # events hold float32


def test_trackio_holds_the_grids_at_their_steps(seen):
    rows = [row for row in seen.rows if "gcpo/images" in row]
    assert [row["train/global_step"] for row in rows] == [1, 2]
    for row, grid in zip(rows, seen.grids, strict=True):
        page = Image.open(Path(os.environ["TRACKIO_DIR"], "media", row["gcpo/images"]["file_path"]))
        assert np.array_equal(np.asarray(page.convert("RGB")), grid)  # trackio adds an alpha channel
    logged = [entry["reward"] for entry in seen.trainer.state.log_history if "loss" in entry]
    assert [row["train/reward"] for row in seen.rows if "train/reward" in row] == logged


def test_completions_stay_text(seen):
    table = pd.read_parquet(sorted((seen.out / "completions").glob("*.parquet"))[1])
    assert table["completion"].tolist() == [f"image {index} of step 1" for index in range(4, 8)]
    assert set(table["prompt"]) <= set(PROMPTS)


def test_grids_follow_their_steps_and_not_evaluation(tiny_janus, tmp_path):
    changes = {"log_images": 2, "log_images_count": 2, "log_images_size": 16, "max_steps": 3}
    between = {"eval_strategy": "steps", "eval_steps": 1, "num_generations_eval": 2}
    everything = {"select_strategies": ["everything"], "weight_form": "none"}
    trainer = janus_trainer(tiny_janus, tmp_path, evaluated=shape_prompts(2), **changes, **between, **everything)
    trainer.train()
    files = sorted((tmp_path / "images").iterdir())
    assert [file.name for file in files] == ["step-000002.png"]
    assert Image.open(files[0]).size == (6 + 2 * 150, 6 + 178)  # one group, nothing tinted where all tokens train


def test_no_grid_unless_asked(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path)
    trainer.train()
    assert trainer._image_log is None and not (tmp_path / "images").exists()


def test_a_text_model_has_no_images_to_log(tiny_text, tmp_path):
    args = settings(tmp_path, log_images=5)
    with pytest.raises(ValueError, match="log_images=5, but llama draws no images; set it to 0"):
        GCPOTrainer(tiny_text, [lambda completions, **_: [0.0] * len(completions)], args, text_prompts())


# the held-out look

HELD_OUT = [{"prompt": PROMPTS[0], "tag": "one"}, {"prompt": PROMPTS[1], "tag": "two"}]


def untidy(prompts, completions, tag, **columns):
    """A reward that draws random numbers, and scores only the images of the first prompt."""
    random.random(), np.random.rand(), torch.rand(1)
    reds = redness(prompts, completions)
    return [red if name == "one" else None for red, name in zip(reds, tag, strict=True)]


def images_of(kept):
    return [batch["completion_ids"].tolist() for batch in kept.batches]


def held_out_log(trainer):
    """Step and held-out values of each entry that has any."""
    found = [(e["step"], {k: v for k, v in e.items() if "held_out" in k}) for e in trainer.state.log_history]
    return [(step, values) for step, values in found if values]


def test_a_run_is_the_same_with_and_without_the_look(tiny_janus, tmp_path):
    alone = record(first := janus_trainer(tiny_janus, tmp_path / "a", max_steps=3))
    first.train()
    second = janus_trainer(tiny_janus, tmp_path / "b", max_steps=3)
    second.add_callback(HeldOutCallback([untidy, digits], HELD_OUT, images_per_prompt=2, every=2))
    kept = record(second)
    second.train()
    assert images_of(kept) == images_of(alone) and kept.losses == alone.losses
    ours, theirs = second.model.state_dict(), first.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The looks are entries of their own; training logs what it logged without them.
    looks = held_out_log(second)
    assert [step for step, _ in looks] == [0, 2]
    names = {"gcpo/held_out/untidy", "gcpo/held_out/digits", "gcpo/held_out/sharpness", "gcpo/held_out/entropy"}
    assert all(set(values) == names for _, values in looks)
    assert looks[0][1]["gcpo/held_out/entropy"] != looks[1][1]["gcpo/held_out/entropy"]  # the policy has moved
    logged = [[e for e in t.state.log_history if "loss" in e] for t in (first, second)]
    assert [[e["step"], e["loss"], e["reward"]] for e in logged[0]] == [
        [e["step"], e["loss"], e["reward"]] for e in logged[1]
    ]


def test_an_unchanged_policy_looks_the_same_and_the_numbers_are_right(tiny_janus, tmp_path):
    look = HeldOutCallback([untidy, "shapes"], shape_prompts(2).add_column("tag", ["one", "two"]), 3, every=1, seed=5)
    trainer = GCPOTrainer(
        tiny_janus, digits, settings(tmp_path, learning_rate=0.0, max_steps=2), shape_prompts(), callbacks=[look]
    )
    trainer.train()
    (_, values), *others = held_out_log(trainer)
    assert [step for step, _ in others] == [1, 2] and all(later == values for _, later in others)
    policy, prompts = trainer.policy, [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    rollout = sample(policy, prompts, 5, list(range(6)), Sampling(guidance_scale=3.0))
    images = policy.decode(rollout.tokens)
    expected = {
        "gcpo/held_out/untidy": np.mean(redness(None, images[:3])),  # the others are None
        "gcpo/held_out/sharpness": np.mean([sharpness(image) for image in images]),
        "gcpo/held_out/entropy": rollout.entropy.mean().item(),
    }
    assert_close({name: values[name] for name in expected}, expected, rtol=1e-5, atol=0, check_dtype=False)
    assert 0 <= values["gcpo/held_out/shapes"] <= 1


def test_ranks_share_the_look(tiny_janus, tmp_path, monkeypatch):
    trainer = janus_trainer(tiny_janus, tmp_path)
    look = HeldOutCallback(redness, HELD_OUT + HELD_OUT[:1], images_per_prompt=1)
    look.attach(trainer)
    whole, drawn = look._measure(), []

    def draw(prompts, indices):
        drawn.append((prompts, indices))
        return type(look)._draw(look, prompts, indices)

    sums = []
    monkeypatch.setattr(look, "_draw", draw)
    for rank in range(2):
        share = OneOfTwo(trainer.accelerator, rank, sums)
        monkeypatch.setattr(look, "_trainer", SimpleNamespace(**trainer_parts(trainer), accelerator=share))
        look._measure()
    assert [indices for _, indices in drawn] == [[0, 1], [2, 2]]  # equally many; the repeated one does not count
    counts = [local[:, 2].tolist() for local in sums]
    assert counts == [[2.0] * 3, [1.0] * 3]
    means = (sums[0] + sums[1])[:, 0] / 3
    assert_close(means, torch.tensor([one.mean for one in whole.values()]), rtol=1e-5, atol=0)


class OneOfTwo:
    """An accelerator that says it is one of two, and keeps what it was to sum."""

    num_processes = 2

    def __init__(self, accelerator, rank, sums):
        self.accelerator, self.process_index, self.sums = accelerator, rank, sums

    def reduce(self, local, reduction):
        self.sums.append(local)
        return local

    def __getattr__(self, name):
        return getattr(self.accelerator, name)


def trainer_parts(trainer):
    """What the look reads of a trainer, besides its accelerator, and what generating needs."""
    names = ("args", "policy", "model", "state", "temperature", "top_k", "top_p", "model_wrapped", "_dist")
    return {name: getattr(trainer, name) for name in names}


def test_the_look_asks_for_a_model_that_draws(tiny_text, tmp_path):
    def length(completions, **columns):
        return [float(len(completion)) for completion in completions]

    args = settings(tmp_path, max_completion_length=4)
    trainer = GCPOTrainer(tiny_text, [length], args, text_prompts(), callbacks=[HeldOutCallback(length, ["w1"])])
    with pytest.raises(ValueError, match="the model is a text model; leave the callback out"):
        trainer.train()


def test_a_resumed_run_does_not_look_twice_at_one_step(tiny_janus, tmp_path):
    def run(steps, **changes):
        trainer = janus_trainer(tiny_janus, tmp_path, max_steps=steps, **changes)
        trainer.add_callback(HeldOutCallback(redness, HELD_OUT, images_per_prompt=1, every=1))
        return trainer

    run(1, save_strategy="steps", save_steps=1).train()
    again = run(2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert [step for step, _ in held_out_log(again)] == [0, 1, 2]


# metrics of several ranks


def test_metrics_are_sums_over_counts_of_all_ranks(tiny_janus, tmp_path, monkeypatch):
    trainer = janus_trainer(tiny_janus, tmp_path)
    trainer.model.train()
    # The other rank has one value of 8; here are 1 and 3, and a 100 that does not count: 12 / 3, not (2 + 8) / 2.
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda sums, reduction: sums + torch.tensor([8.0, 1.0]))
    trainer._log_mean("gcpo/test", torch.tensor([1.0, 100.0, 3.0]), torch.tensor([True, False, True]))
    assert trainer._metrics["train"]["gcpo/test"] == [4.0]
    monkeypatch.setattr(trainer.accelerator, "reduce", lambda sums, reduction: sums)
    trainer._log_mean("gcpo/none", torch.ones(2), torch.zeros(2, dtype=torch.bool))
    assert np.isnan(trainer._metrics["train"]["gcpo/none"]).all()
