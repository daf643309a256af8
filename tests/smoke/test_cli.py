"""The commands as a user types them: two training steps of a recipe, samples, scores, and what a mistake says."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import load_janus

from gcpo_trl.cli.main import COMMANDS, main

pytestmark = pytest.mark.smoke

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes" / "shapes_gcpo.yaml"
SMALL = ["--per_device_train_batch_size", "4", "--num_generations", "2", "--dataset_size", "8", "--max_steps", "2"]


def run(*words):
    """A fresh interpreter with this checkout on its path, and the rewards of tests/tiny.py."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, env=env, timeout=280)


def small(tiny_janus, folder):
    return ["--model_name_or_path", tiny_janus, "--output_dir", str(folder), "--disable_tqdm", "true", *SMALL]


def mistake(capsys, *words):
    """What a command writes about a mistake of the user, who gets exit code 2."""
    try:
        code = main(list(words))
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    return capsys.readouterr().err


def test_a_recipe_trains_two_steps(tiny_janus, tmp_path):
    # A random model never earns the recipe's own reward, so nothing would move.
    words = [str(RECIPE), *small(tiny_janus, tmp_path / "out"), "--reward_funcs", "tiny:digits"]
    done = run("-m", "gcpo_trl", "train", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = re.findall(r"'gcpo/select/fraction': '?([\d.]+)", done.stdout)
    assert [float(step) for step in steps] == pytest.approx([24 / 81] * 2, abs=1e-3)
    assert len(re.findall(r"'rewards/digits/mean'", done.stdout)) == 2
    assert "training" in done.stderr and "language_model" in done.stderr
    model, _ = load_janus(str(tmp_path / "out"))
    before, _ = load_janus(tiny_janus)
    pairs = zip(model.state_dict().items(), before.state_dict().values(), strict=True)
    changed = {name.split(".")[1] for (name, value), old in pairs if not torch.equal(value, old)}
    assert changed == {"language_model"}


def test_the_recipe_of_llamagen_trains_two_steps(tmp_path):
    out = tmp_path / "out"
    recipe = ROOT / "recipes" / "shapes_llamagen_gcpo.yaml"
    done = run("-m", "gcpo_trl", "train", str(recipe), "--output_dir", str(out), "--disable_tqdm", "true", *SMALL)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = re.findall(r"'gcpo/select/fraction': '?([\d.]+)", done.stdout)
    assert [float(step) for step in steps] == pytest.approx([24 / 81] * 2, abs=1e-3)
    assert (out / "model.safetensors").is_file()
    assert main(["sample", "--model", str(out), "--prompt", "a photo of a ring", "--out", str(out / "a.png")]) == 0
    assert Image.open(out / "a.png").size[0] > 0


@pytest.mark.parametrize("asked", ["key", "recipe"])
def test_a_quantised_model_trains_an_adapter(tiny_janus, tmp_path, asked):
    pytest.importorskip("bitsandbytes", reason="install gcpo_trl[qlora]")
    four_bit, recipe = ["--load_in_4bit", "true"], RECIPE
    if asked == "recipe":
        four_bit, recipe = [], tmp_path / "mine.yaml"
        wanted = '{"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}'
        recipe.write_text(f"{RECIPE.read_text()}model_init_kwargs: {wanted}\n")
    words = ["train", str(recipe), *small(tiny_janus, tmp_path / "out"), "--reward_funcs", "tiny:digits"]
    assert main([*words, "--use_peft", "true", *four_bit]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert "language_model" in config["target_modules"]
    saved = load_file(tmp_path / "out" / "adapter_model.safetensors")
    # TRL keeps the adapters of a quantised model in bf16; two steps have moved each of fourteen from zero.
    added = [value for name, value in saved.items() if "lora_B" in name]
    assert len(added) == 14 and all(value.dtype == torch.bfloat16 and value.any() for value in added)


def test_a_quantised_model_without_an_adapter_is_a_mistake(capsys, tiny_janus, tmp_path):
    pytest.importorskip("bitsandbytes", reason="install gcpo_trl[qlora]")
    words = ["train", str(RECIPE), *small(tiny_janus, tmp_path), "--load_in_4bit", "true"]
    assert "without peft_config leaves nothing to train" in mistake(capsys, *words)
    assert "write --dtype bfloat16" in mistake(capsys, *words, "--use_peft", "true", "--dtype", "auto")


def test_a_recipe_is_a_script_to_accelerate(tiny_janus, tmp_path):
    launch = ["-m", "accelerate.commands.accelerate_cli", "launch", "--cpu", "--num_processes", "1"]
    done = run(*launch, str(RECIPE), *small(tiny_janus, tmp_path / "out"), "--max_steps", "1")
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_mistake_in_a_launched_recipe_is_one_line(tiny_janus, tmp_path):
    done = run(str(RECIPE), *small(tiny_janus, tmp_path), "--wieght_clip", "0.3")
    assert done.returncode == 2
    assert "the command line has an unknown key 'wieght_clip'; did you mean weight_clip" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_goes_on_from_its_checkpoint(tiny_janus, tmp_path):
    words = ["train", str(RECIPE), *small(tiny_janus, tmp_path), "--save_strategy", "steps", "--save_steps", "1"]
    assert main([*words, "--max_steps", "1"]) == 0
    assert main([*words, "--resume", "true"]) == 0
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["global_step"] == 2 and [entry["step"] for entry in state["log_history"]] == [1, 2]


def test_lora_from_the_command_line(tiny_janus, tmp_path):
    lora = ["--use_peft", "true", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"]
    assert main(["train", str(RECIPE), *small(tiny_janus, tmp_path), *lora]) == 0
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_samples_are_written(tiny_janus, tmp_path, capsys):
    out = tmp_path / "deep" / "samples.png"
    words = ["--prompt", "a photo of a red circle", "--prompt", "a photo of two bars", "--images", "3"]
    assert main(["sample", "--model", tiny_janus, *words, "--out", str(out)]) == 0
    assert "6 images written to" in capsys.readouterr().out
    assert Image.open(out).size[0] > Image.open(out).size[1] > 200  # two rows of three


def test_scores_are_printed_and_written(tiny_janus, tmp_path, capsys):
    out = tmp_path / "deep" / "report.json"
    assert main(["evaluate", "--model", tiny_janus, "--images", "1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "| overall |" in said and "mean ± standard error" in said
    report = json.loads(out.read_text())
    assert set(report["tasks"]) == {"single_object", "two_object", "counting", "colors", "position", "color_attr"}
    assert report["images"] == 206 and 0 <= report["overall"]["exact"]["mean"] <= 1


def test_the_demo_shows_what_it_learnt(tiny_janus, tmp_path, capsys):
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(
        f'model_name_or_path: "{tiny_janus}"\nper_device_train_batch_size: 4\nnum_generations: 2\ndataset_size: 8\n'
        "use_cpu: True\nbf16: False\nreport_to: []\nsave_strategy: 'no'\nlogging_steps: 1\ndisable_tqdm: True\n"
    )
    out = tmp_path / "demo"
    assert main(["demo", "--recipe", str(recipe), "--out", str(out), "--steps", "2", "--images", "1"]) == 0
    said = capsys.readouterr().out
    for name in ("learning_curve.png", "before_after.png", "critical_tokens.png"):
        assert str(out / name) in said
        assert Image.open(out / name).size[0] > 300
    scores = json.loads((out / "scores.json").read_text())
    assert set(scores) == {"before", "after"}


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(command in said for command in COMMANDS)


def test_an_unknown_command_is_a_mistake(capsys):
    assert "there is no command 'trian'" in mistake(capsys, "trian")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["train", "no_such.yaml"], "there is no recipe 'no_such.yaml'"),
        (["train", str(RECIPE), "--select_strategies", "initail"], "did you mean 'initial'"),
        (["train", str(RECIPE), "--reward_funcs", "shape"], "did you mean 'shapes'"),
        (["train", str(RECIPE), "--dataset_name", "no_such.jsonl"], "'no_such.jsonl' is not a file"),
        (["train", str(RECIPE), "--model_name_or_path", "./no_such_model"], "no_such_model"),
        (["train", "--output_dir", "x", "--use_cpu", "true"], "model_name_or_path is missing"),
        (["train", str(RECIPE), "--num_generations", "5"], "divisible"),
        (["sample", "--prompt", "a cat", "--model", "./no_such_model"], "no_such_model"),
        (["sample", "--prompt", "a cat", "--family", "januss"], "did you mean 'janus'"),
        (["sample"], "the following arguments are required: --prompt"),
    ],
    ids=lambda value: " ".join(value[-2:]) if isinstance(value, list) else None,
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys, words, says):
    said = mistake(capsys, *words)
    assert says in said and "Traceback" not in said


def test_a_checkpoint_of_another_class_is_a_mistake(tiny_text, capsys):
    words = ["sample", "--prompt", "a cat", "--model", tiny_text]
    assert "holds a text model, which draws no images; families: janus, llamagen" in mistake(capsys, *words)
    said = mistake(capsys, *words, "--family", "janus")
    assert "holds a 'llama' model; this adapter loads 'janus' checkpoints" in said
