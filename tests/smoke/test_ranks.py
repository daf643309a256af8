"""Two real processes, started by accelerate with the files of recipes/accelerate, train as one process does."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
WORKER = str(ROOT / "tests" / "ranks_worker.py")
CONFIGS = ROOT / "recipes" / "accelerate"
CASES = ("full_aligned", "full_inside", "lora_aligned", "lora_inside")  # of a rollout buffer
RESUMING = [f"{what}_{case}" for case in CASES for what in ("saved", "resumed")]


def launch(words, timeout=400):
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        env.pop(name, None)
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=timeout, cwd=ROOT)


def accelerated(config, *words):
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml")]
    return launch([*launcher, "--main_process_port", "0", *words])


def reports(folder, scenario):
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"{scenario}-*.json"))]


def rows_of(folder, scenario):
    """All rows of each loss, whatever rank and order they were in: tokens -> mask, advantage, weight."""
    ranks = reports(folder, scenario)
    steps = zip(*(report["rows"] for report in ranks), strict=True)
    return [{tuple(row[0]): row[1:] for rank in step for row in rank} for step in steps]


def difference(one, other):
    """Largest difference of two sets of parameters of the same names."""
    assert one.keys() == other.keys() and len(one) > 10
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def alone(tiny_janus, tmp_path_factory):
    """What one process does."""
    folder = tmp_path_factory.mktemp("alone")
    done = launch([WORKER, str(folder), tiny_janus, "full", "lora", "stage", *RESUMING])
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ddp(tiny_janus, tmp_path_factory):
    """What two processes do under DDP."""
    folder = tmp_path_factory.mktemp("ddp")
    done = accelerated("ddp", WORKER, str(folder), tiny_janus, "full", "lora", "stage", "all_tokens", *RESUMING)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("scenario", ["full", "lora", "stage"])
def test_a_group_on_two_ranks_is_the_group_on_one(alone, ddp, scenario):
    (single,), pair = reports(alone, scenario), reports(ddp, scenario)
    assert [report["world"] for report in pair] == [2, 2] and single["world"] == 1
    assert {report["engine"] for report in pair} == {"DistributedDataParallel"}
    for expected, found in zip(rows_of(alone, scenario), rows_of(ddp, scenario), strict=True):
        assert len(found) == 4 and found.keys() == expected.keys()  # no twin images, and the same ones
        for tokens, (mask, advantage, weight) in found.items():
            assert mask == expected[tokens][0] and sum(mask) == 24
            assert advantage == pytest.approx(expected[tokens][1], abs=1e-6)
            assert weight == pytest.approx(expected[tokens][2], abs=1e-4)
    assert pair[0]["losses"] == pytest.approx(single["losses"], abs=1e-5)
    assert len(single["disagreement"]) == 3 and 0 < single["disagreement"][0] < 1
    assert pair[0]["disagreement"] == pytest.approx(single["disagreement"], abs=1e-6)
    assert pair[0]["norms"] == pytest.approx(single["norms"], rel=1e-3)
    trained = load_file(ddp / f"{scenario}.safetensors")
    assert difference(trained, load_file(alone / f"{scenario}.safetensors")) < 1e-5


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("case", CASES)
def test_a_continued_run_is_the_uninterrupted_one(request, processes, case):
    folder = request.getfixturevalue({1: "alone", 2: "ddp"}[processes])
    whole, continued = reports(folder, f"saved_{case}"), reports(folder, f"resumed_{case}")
    assert len(continued) == processes
    for before, after in zip(whole, continued, strict=True):
        done = len(before["rows"]) - len(after["rows"])
        assert done == (2 if "aligned" in case else 3)
        assert after["losses"] == before["losses"] and after["norms"] == before["norms"]
        assert after["rows"] == before["rows"][done:]
        assert after["images"] == before["images"][-1:]
    parameters = (load_file(folder / f"{what}_{case}.safetensors") for what in ("saved", "resumed"))
    assert difference(*parameters) == 0


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_trains_as_ddp_does(tiny_janus, tmp_path, ddp, stage):
    names = ["full", "all_tokens", "saved_full_inside", "resumed_full_inside"]
    done = accelerated(f"zero{stage}", WORKER, str(tmp_path), tiny_janus, *names)
    assert done.returncode == 0, done.stderr[-3000:]
    for scenario in ("full", "all_tokens"):
        pair = reports(tmp_path, scenario)
        assert [(r["world"], r["engine"], r["stage"]) for r in pair] == [(2, "DeepSpeedEngine", stage)] * 2
        assert pair[0]["losses"] == pytest.approx(reports(ddp, scenario)[0]["losses"], abs=1e-5)
        masks = [{ids: row[0] for ids, row in step.items()} for step in rows_of(tmp_path, scenario)]
        assert masks == [{ids: row[0] for ids, row in step.items()} for step in rows_of(ddp, scenario)]
        trained = load_file(tmp_path / f"{scenario}.safetensors")
        assert difference(trained, load_file(ddp / f"{scenario}.safetensors")) < 1e-5
    before, after = (reports(tmp_path, f"{what}_full_inside")[0] for what in ("saved", "resumed"))
    assert after["losses"] == before["losses"] and after["images"] == before["images"][-1:]
    assert difference(*(load_file(tmp_path / f"{what}_full_inside.safetensors") for what in ("saved", "resumed"))) == 0


def test_an_error_on_one_rank_ends_all_with_its_cause(tiny_janus, tmp_path):
    start = time.monotonic()
    done = accelerated("ddp", WORKER, str(tmp_path), tiny_janus, "failing")
    assert done.returncode != 0 and "RuntimeError: the detector cannot read this image" in done.stderr
    assert time.monotonic() - start < 60 + 60  # start-up, then a minute at most
    assert not list(tmp_path.glob("failing-*.json"))


def test_the_recipe_of_the_demo_trains_on_two_processes(tiny_janus, tmp_path):
    words = [str(ROOT / "recipes" / "shapes_gcpo.yaml"), "--output_dir", str(tmp_path), "--max_steps", "1"]
    sizes = ["--per_device_train_batch_size", "2", "--num_generations", "4", "--dataset_size", "8"]
    done = accelerated("zero2", *words, *sizes, "--disable_tqdm", "true")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "2 process(es), DeepSpeed ZeRO-2, on cpu" in done.stderr
