"""A run that is killed again and again, at any moment, ends where the run that was left alone ends."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
STEPS = 8
KILLS = 5


def start(tiny_janus, folder):
    """A process that trains to the last step, from its last whole checkpoint if there is one."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    settings = {
        "model_name_or_path": tiny_janus,
        "output_dir": folder,
        "reward_funcs": "tiny:digits",
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "dataset_size": 8,
        "max_steps": STEPS,
        "num_iterations": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "disable_tqdm": "true",
        "resume": "true",
    }
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    command = [sys.executable, "-m", "gcpo_trl", "train", str(ROOT / "recipes" / "shapes_gcpo.yaml"), *words]
    with open(folder.with_suffix(".log"), "a") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env)


def newest(folder):
    """Highest step of which a checkpoint exists, whole or not."""
    return max((int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")), default=0)


def kill_at(process, folder, delay):
    """SIGKILL, ``delay`` seconds after the process began its first new checkpoint."""
    before = newest(folder)
    while newest(folder) == before and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    return process.wait()


def test_a_killed_run_ends_as_the_one_left_alone(tiny_janus, tmp_path):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    assert start(tiny_janus, alone).wait() == 0, alone.with_suffix(".log").read_text()[-3000:]
    chance = random.Random(0)
    ends = [kill_at(start(tiny_janus, killed), killed, chance.uniform(0, 0.15)) for _ in range(KILLS)]
    assert ends.count(-signal.SIGKILL) >= 3, "the machine is too fast for this test: the run was over before its end"
    assert start(tiny_janus, killed).wait() == 0, killed.with_suffix(".log").read_text()[-3000:]

    expected, found = (load_file(folder / "model.safetensors") for folder in (alone, killed))
    assert all((found[name] == value).all() for name, value in expected.items())
    first, second = (history(folder / f"checkpoint-{STEPS}") for folder in (alone, killed))
    assert first == second and len(first) == STEPS


def history(checkpoint):
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["grad_norm"]) for entry in log]
