"""`gcpo doctor` as a user runs it: in this environment, and in one that is broken in several ways at once."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
# Loaded by Python at its start: the package is not there, neither to import nor to ask for its version.
WITHOUT_WANDB = """
import importlib.metadata, sys
version = importlib.metadata.version
def without_wandb(name):
    if name == "wandb":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = without_wandb
sys.modules["wandb"] = None
"""


def doctor(folder, *words, first_on_path=(), **variables):
    """Exit code and lines by subject, without what a launcher of the tests may have left behind."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    env = {name: value for name, value in env.items() if name not in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    env["PYTHONPATH"] = os.pathsep.join([*map(str, first_on_path), str(ROOT)])
    command = [sys.executable, "-m", "gcpo_trl", "doctor", "--output-dir", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env | variables, timeout=120)
    lines = done.stdout.splitlines()
    assert lines and all(re.match(r"(ok    |warn  |FAIL  )[\w ]+: \S", line) for line in lines), (
        [line for line in lines if not re.match(r"(ok    |warn  |FAIL  )[\w ]+: \S", line)],
        done.stderr[-3000:],
    )
    by_subject = {line[6:].partition(":")[0]: line for line in lines}
    assert len(by_subject) == len(lines)  # one line each
    return done.returncode, by_subject


def test_this_environment_is_healthy(tmp_path):
    code, lines = doctor(tmp_path, "--model", "shapes-janus")
    assert code == 0 and not [line for line in lines.values() if line.startswith("FAIL")]
    assert lines["model"] == "ok    model: shapes-janus is on this disk, not loaded"


def test_a_broken_environment_has_a_line_for_each_fault(tmp_path):
    fakes = tmp_path / "fakes"
    (fakes / "trl-1.15.0.dist-info").mkdir(parents=True)
    (fakes / "trl-1.15.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: trl\nVersion: 1.15.0\n")
    (fakes / "sitecustomize.py").write_text(WITHOUT_WANDB)
    model = tmp_path / "nowhere"
    code, lines = doctor(
        *(tmp_path, "--model", str(model)),
        first_on_path=[fakes],
        ACCELERATE_USE_DEEPSPEED="true",
        ACCELERATE_USE_CPU="true",
        WORLD_SIZE="4",
        HPSV2_CHECKPOINT=str(model),
    )
    assert code == 1
    assert lines["trl"] == "FAIL  trl: 1.15.0 is outside >=1.16,<1.17; run: pip install 'trl==1.16.0'"
    assert lines["wandb"].startswith("warn  wandb: not installed, optional; to use it: pip install 'gcpo_trl[wandb]'")
    missing = "has no config.json and no model.safetensors on this disk; give its folder, or hf download it"
    assert lines["model"] == f"FAIL  model: {model} {missing}"
    assert lines["reward hpsv2"].startswith(f"warn  reward hpsv2: not on this disk: {model} (HPS_v2.1_compressed.pt; ")
    assert "DDP or one process; unset ACCELERATE_USE_CPU" in lines["DeepSpeed"]
    assert lines["rendezvous"].startswith("warn  rendezvous: WORLD_SIZE=4 but no MASTER_ADDR, LOCAL_RANK; ")
    assert lines["shapes model"].startswith("ok")  # what works is still looked at
