"""What the launcher asked for: accumulation that keeps the batch, and settings that keep the engine."""

from types import SimpleNamespace

import pytest
import torch

from gcpo_trl.runs.devices import accumulation_for, launcher_settings
from gcpo_trl.runs.recipe import parse
from gcpo_trl.trainer.checks import check_engine, engine_report

CPU = ["--output_dir", "a", "--use_cpu", "true"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "DS_ACCELERATOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("total", "per_device", "processes", "steps"), [(64, 8, 1, 8), (64, 8, 4, 2), (64, 8, 8, 1), (48, 4, 6, 2)]
)
def test_accumulation_keeps_the_batch_of_all_devices(total, per_device, processes, steps):
    assert accumulation_for(total, per_device, processes, group=8) == steps


@pytest.mark.parametrize(
    ("total", "processes", "group", "near"),
    [(64, 3, 8, "48 or 72"), (20, 2, 8, "16 or 32"), (8, 2, 4, "16"), (24, 1, 16, "16 or 32")],
)
def test_a_batch_that_cannot_be_met_gives_the_nearest(total, processes, group, near):
    # Steps of 8 images a process, and whole groups: multiples of lcm(8 * processes, group).
    with pytest.raises(
        ValueError, match=rf"total_batch_size={total} .* {processes} processes of 8 .* nearest: {near}$"
    ):
        accumulation_for(total, 8, processes, group)


def test_a_recipe_trains_alike_on_any_number_of_devices(monkeypatch):
    words = [*CPU, "--total_batch_size", "64", "--per_device_train_batch_size=8"]
    assert parse(words)[1].gradient_accumulation_steps == 8
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match="leave one of the two out"):
        parse([*words, "--gradient_accumulation_steps", "2"])
    with pytest.raises(ValueError, match="nearest: 64 or 96"):
        parse([*CPU, "--total_batch_size", "80", "--per_device_train_batch_size=8"])


def test_the_command_lines_batch_beats_the_recipes_accumulation(tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text('output_dir: "a"\nuse_cpu: True\ngradient_accumulation_steps: 1\n')
    words = [str(recipe), "--per_device_train_batch_size", "8", "--total_batch_size", "64"]
    assert parse(words)[1].gradient_accumulation_steps == 8
    recipe.write_text(recipe.read_text() + "total_batch_size: 64\n")
    with pytest.raises(ValueError, match="leave one of the two out"):
        parse(words)


def test_deepspeed_without_a_gpu_keeps_its_engine(monkeypatch, tmp_path):
    assert launcher_settings({}) == {}
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert launcher_settings({"use_cpu": True}) == {"use_cpu": False, "ddp_backend": "gloo"}
    assert launcher_settings({"ddp_backend": "mpi"})["ddp_backend"] == "mpi"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert launcher_settings({"use_cpu": True}) == {}


def test_fsdp_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="no GPU and accelerate has it on GPUs only; use ddp or zero2"):
        launcher_settings({})


def test_processes_that_train_alone_are_refused(monkeypatch):
    alone = SimpleNamespace(num_processes=1, _cpu=False)
    check_engine(alone)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_engine(alone)  # a container's variable, no launcher
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="started 2 processes, but each trains alone"):
        check_engine(alone)
    check_engine(SimpleNamespace(num_processes=2, _cpu=True))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="use_cpu=True makes accelerate train with DDP instead of DeepSpeed"):
        check_engine(SimpleNamespace(num_processes=2, _cpu=True))


@pytest.mark.parametrize(
    ("kind", "stage", "says"),
    [
        ("DEEPSPEED", 3, "2 process(es), DeepSpeed ZeRO-3, on cpu"),
        ("MULTI_CPU", None, "2 process(es), MULTI_CPU, on cpu"),
    ],
)
def test_a_run_says_how_it_runs(kind, stage, says):
    plugin = SimpleNamespace(zero_stage=stage) if stage else None
    state = SimpleNamespace(deepspeed_plugin=plugin)
    accelerator = SimpleNamespace(
        distributed_type=f"DistributedType.{kind}", num_processes=2, state=state, device="cpu"
    )
    assert engine_report(accelerator) == says
