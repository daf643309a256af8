"""A study that is killed goes on, does nothing twice, and ends with the table of one that was left alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
STUDY = {
    "question": "Do all tokens do better than the critical ones?",
    "recipe": str(ROOT / "recipes/shapes_gcpo.yaml"),
    "settings": {"max_steps": 2, "per_device_train_batch_size": 8, "num_generations": 4},
    "seeds": 1,
    "baseline": "GRPO",
    "arms": {
        "GRPO": {"select_strategies": ["everything"], "weight_form": "none"},
        "GCPO": {},
        "lost": {"dataset_name": "nowhere.jsonl"},
    },
    "evaluate": {"limit": 6, "images_per_prompt": 2},
}


def start(file, out, **options):
    words = [sys.executable, "-m", "gcpo_trl", "study", str(file), "--out", str(out), "--jobs", "1"]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


def rows(out):
    return [line for line in (out / "small/table.md").read_text().splitlines() if line.startswith(("|", "Failed"))]


@pytest.mark.timeout(600)
def test_a_killed_study_goes_on(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    whole = start(file, tmp_path / "whole")
    printed, _ = whole.communicate()
    assert whole.returncode == 1, printed  # one arm cannot run, and the others did
    assert "4 of 4 runs to do" in printed
    table = rows(tmp_path / "whole")
    assert [line.split(" | ")[:2] for line in table[2:6]] == [
        *[["| base model", "1"], ["| GRPO", "1"], ["| GCPO", "1"], ["| lost", "0"]],
    ]
    assert "'nowhere.jsonl' is not a file" in table[6]
    assert (tmp_path / "whole/small/picture.png").stat().st_size > 10_000

    killed = start(file, tmp_path / "killed", start_new_session=True)
    runs = tmp_path / "killed/runs"
    while not list(runs.glob("*.json")):
        assert killed.poll() is None, killed.communicate()[0]
        time.sleep(0.1)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert len(finished) < 3
    resumed = start(file, tmp_path / "killed")
    printed, _ = resumed.communicate()
    assert f"{4 - len(finished)} of 4 runs to do" in printed, printed
    assert rows(tmp_path / "killed") == table
    assert all((runs / name).stat().st_mtime_ns == then for name, then in finished.items())
