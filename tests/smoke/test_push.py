"""What arrives where `gcpo train --push_to_hub true` sends a run: over HTTP, to a stand-in on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub import serving
from safetensors.torch import load

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
RUN = {
    "per_device_train_batch_size": 4,
    "num_generations": 2,
    "dataset_size": 8,
    "max_steps": 2,
    "reward_funcs": "tiny:digits",
    "log_images": 1,
    "disable_tqdm": "true",
    "push_to_hub": "true",
    "hub_model_id": "someone/reds",
}
ALWAYS = {"README.md", "samples.png", "images/step-000001.png", "images/step-000002.png"} | {
    *("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json")
}
WHOLE = {"model.safetensors", "config.json", "generation_config.json"}
ADAPTER = {"adapter_model.safetensors", "adapter_config.json"}
LAST = "Model save"


def push(hub, model, folder, **changes):
    """Train in a fresh interpreter, whose Hub is ``hub``."""
    settings = RUN | {"model_name_or_path": model, "output_dir": folder} | changes
    words = [str(word) for key, value in settings.items() for word in (f"--{key}", value)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    ours = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_nobodys", "PYTHONPATH": path}
    command = [sys.executable, "-m", "gcpo_trl", "train", str(ROOT / "recipes" / "shapes_gcpo.yaml"), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | ours, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_model_arrives_with_its_card_and_without_a_pickle(tiny_janus, tmp_path):
    out = tmp_path / "out"
    with serving() as hub:
        push(hub, tiny_janus, out)
    assert hub.made == ["someone/reds"]
    ((message, files),) = hub.commits
    assert message == LAST and set(files) == ALWAYS | WHOLE  # transformers would add training_args.bin
    assert all(content == (out / name).read_bytes() for name, content in files.items())
    assert len(load(files["model.safetensors"])) == 166
    assert json.loads(files["generation_config.json"])["guidance_scale"] == 1.5  # the recipe's
    card = files["README.md"].decode()
    assert "](samples.png)" in card and "gcpo sample --model someone/reds" in card
    assert files["samples.png"] == files["images/step-000002.png"]


def test_an_adapter_arrives_with_every_checkpoint(tiny_janus, tmp_path):
    with serving() as hub:
        push(hub, tiny_janus, tmp_path / "out", use_peft="true", save_strategy="steps", save_steps=1)
    # An upload still under way when the next checkpoint is saved lets that one pass, and the last is always sent.
    messages = [message for message, _ in hub.commits]
    assert messages[0] == "Training in progress, step 1" and messages[-1] == LAST
    assert set(hub.commits[0][1]) == (ALWAYS | ADAPTER) - {"images/step-000002.png"}
    files = hub.commits[-1][1]
    assert set(files) == ALWAYS | ADAPTER
    assert "gcpo sample --model " in files["README.md"].decode()
    first, last = (load(files["adapter_model.safetensors"]) for _, files in (hub.commits[0], hub.commits[-1]))
    assert len(last) == 28 and any(not first[name].equal(last[name]) for name in last)
