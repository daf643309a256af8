"""gcpo doctor: every status of every check, in a healthy environment and in broken ones."""

import configparser
import importlib.metadata
import os
import re
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gcpo_trl.cli import doctor
from gcpo_trl.cli.doctor import GIB, PACKAGES, Finding, check_package, examine
from gcpo_trl.cli.main import main
from gcpo_trl.runs import launchers

ROOT = Path(__file__).parents[2]
LAUNCH = ["/usr/bin/python", "/usr/bin/accelerate", "launch"]


@pytest.fixture(autouse=True)
def nothing_left_behind(monkeypatch):
    """No launcher above this process, no saved settings of accelerate, none of their variables."""
    monkeypatch.setattr(launchers, "launcher_words", list)
    monkeypatch.setattr(launchers, "accelerate_defaults", dict)
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "ACCELERATE_USE_CPU", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def installed(monkeypatch):
    """Versions as if they were installed; None is a package that is not."""
    versions = {name: tested for name, (tested, _, _) in PACKAGES.items()}

    def version(name):
        if versions[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


def report(capsys, folder):
    """Exit code of the command and its lines by subject."""
    code = main(["doctor", "--output-dir", str(folder)])
    lines = capsys.readouterr().out.splitlines()
    assert all(re.match(r"(ok    |warn  |FAIL  )[\w ]+: \S", line) for line in lines), lines
    return code, {line[6:].partition(":")[0]: line for line in lines}


@pytest.mark.parametrize("name", sorted(doctor.SETTINGS))
def test_every_reward_with_weights_says_which_are_missing(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: None)
    finding = doctor.check_weights(name)
    assert finding.status == "warn"
    assert all(variable in finding.text for variable in doctor.SETTINGS[name][1])


def test_a_healthy_environment_exits_0(capsys, tmp_path, installed):
    code, lines = report(capsys, tmp_path)
    assert code == 0
    assert {name for name, line in lines.items() if line.startswith("FAIL")} == set()
    assert list(lines)[: 1 + len(PACKAGES)] == ["python", *PACKAGES]
    assert lines["trl"] == "ok    trl: 1.16.0, tested"
    assert lines["shapes model"].startswith("ok    shapes model: opens, ")
    assert lines["reward shapes"].startswith(
        "ok    reward shapes: a rendered scene scores 1 with its own caption, 0.5 "
    )


def test_a_broken_environment_exits_1_and_the_other_checks_still_run(capsys, tmp_path, installed, monkeypatch):
    installed["trl"] = "1.17.0"

    def broken():
        raise OSError("no file\nmodel.safetensors")

    monkeypatch.setattr(doctor, "check_shapes_model", broken)
    code, lines = report(capsys, tmp_path)
    assert code == 1
    assert lines["trl"] == "FAIL  trl: 1.17.0 is outside >=1.16,<1.17; run: pip install 'trl==1.16.0'"
    assert lines["shapes model"] == (
        "FAIL  shapes model: OSError: no file model.safetensors; the check itself stopped here"
    )
    assert lines["rendezvous"].startswith("ok")


def test_the_versions_are_those_of_the_package():
    pinned = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = setup["options"]["install_requires"].split()
    for name, (tested, allowed, extra) in PACKAGES.items():
        assert pinned[name] == tested
        assert extra in setup["options.extras_require"] if extra else f"{name}{allowed}" in required


@pytest.mark.parametrize(
    ("name", "seen", "status", "says"),
    [
        ("trl", "1.16.0", "ok", "tested"),
        ("trl", "1.16.2", "warn", "1.16.2, not tested; if something breaks: pip install 'trl==1.16.0'"),
        ("trl", "1.15.3", "FAIL", "outside >=1.16,<1.17"),
        ("torch", "2.13.0+cu130", "ok", "2.13.0+cu130, tested"),
        ("torch", "2.12.1", "warn", "not tested"),
        ("torch", "2.5.0", "FAIL", "outside >=2.6"),
        ("peft", None, "FAIL", "not installed; run: pip install 'peft==0.21.2'"),
        ("peft", "0.9.0", "warn", "not tested"),
        ("deepspeed", None, "warn", "not installed, optional; to use it: pip install 'gcpo_trl[deepspeed]'"),
        ("wandb", None, "warn", "gcpo_trl[wandb]"),
    ],
)
def test_a_version(installed, name, seen, status, says):
    installed[name] = seen
    finding = check_package(name)
    assert (finding.status, finding.subject) == (status, name) and says in finding.text


@pytest.mark.parametrize(("seen", "status"), [((3, 11, 4), "ok"), ((3, 13, 0), "warn"), ((3, 10, 9), "FAIL")])
def test_python(monkeypatch, seen, status):
    monkeypatch.setattr("sys.version_info", seen)
    assert doctor.check_python().status == status


def test_the_accelerator(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert doctor.check_accelerator() == Finding("ok", "accelerator", "no GPU: CPU; the shapes recipe is made for it")
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    assert doctor.check_accelerator().status == "warn"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H200")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert doctor.check_accelerator() == Finding("ok", "accelerator", "H200 x 4, bf16")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert doctor.check_accelerator().status == "warn" and "bf16: False" in doctor.check_accelerator().text


def test_free_memory(monkeypatch):
    for free, status in ((3 * GIB, "ok"), (GIB, "warn")):
        monkeypatch.setattr("psutil.virtual_memory", lambda free=free: SimpleNamespace(available=free))
        finding = doctor.check_memory()
        assert finding.status == status and f"{free / GIB:.1f} GiB free" in finding.text


def test_free_disk(monkeypatch, tmp_path):
    usage = namedtuple("usage", "free")
    for free, status in ((6 * GIB, "ok"), (4 * GIB, "warn"), (GIB // 8, "FAIL")):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: usage(free))
        finding = doctor.check_disk(tmp_path / "not" / "yet")
        assert finding.status == status and finding.text.partition(" under ")[2].startswith(str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert "no folder that can be written to" in doctor.check_disk(tmp_path).text


def test_a_shapes_model_that_is_not_finite(monkeypatch):
    model = torch.nn.Linear(1, 1)
    monkeypatch.setattr("gcpo_trl.policies.load", lambda *_, **__: SimpleNamespace(model=model, num_tokens=81))
    assert doctor.check_shapes_model().status == "ok"
    model.weight.data.fill_(torch.nan)
    assert "parameter weight is not finite" in doctor.check_shapes_model().text


def test_a_reward_that_is_wrong(monkeypatch):
    for scores in ((0.5, 0.5), (1.0, 1.0)):
        monkeypatch.setitem(doctor.GOLDEN, "shapes", lambda scores=scores: scores)
        assert doctor.check_golden("shapes").status == "FAIL"


def test_rewards_whose_weights_are_not_here(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    finding = doctor.check_weights("geneval")
    assert finding.status == "warn"
    assert "facebook/mask2former-swin-small-coco-instance (model.safetensors; GENEVAL_DETECTOR)" in finding.text
    assert "openai/clip-vit-large-patch14" in finding.text
    monkeypatch.setenv("HPSV2_CHECKPOINT", str(tmp_path / "missing"))
    monkeypatch.setenv("HPSV2_TOKENIZER", str(tmp_path))
    (tmp_path / "vocab.json").write_text("{}")
    text = doctor.check_weights("hpsv2").text
    assert f"{tmp_path / 'missing'} (HPS_v2.1_compressed.pt; HPSV2_CHECKPOINT)" in text and "TOKENIZER)" not in text
    monkeypatch.setenv("HPSV2_CHECKPOINT", str(tmp_path))
    (tmp_path / "HPS_v2.1_compressed.pt").write_text("")
    assert doctor.check_weights("hpsv2").status == "ok"
    assert "no self-test is known" in doctor.check_weights("mine").text


def test_a_model_is_looked_for_and_not_loaded(monkeypatch, tmp_path):
    assert doctor.check_model("shapes-janus") == Finding("ok", "model", "shapes-janus is on this disk, not loaded")
    (tmp_path / "config.json").write_text("{}")
    finding = doctor.check_model(str(tmp_path))
    assert finding.status == "FAIL" and "has no model.safetensors on this disk" in finding.text
    (tmp_path / "model.safetensors.index.json").write_text("{}")  # of one in several files
    assert doctor.check_model(str(tmp_path)).status == "ok"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    assert "someone/reds has no config.json and no model" in doctor.check_model("someone/reds").text


def test_the_hub_cache_counts_as_disk(monkeypatch):
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda where, file: f"/cache/{where}/{file}")
    assert doctor.check_weights("geneval").status == "ok"


@pytest.mark.parametrize(
    ("env", "words", "defaults", "status"),
    [
        ({}, [], {}, "ok"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, [], {}, "ok"),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "1"}, [], {}, "warn"),
        ({"ACCELERATE_USE_CPU": "True"}, [], {"distributed_type": "DEEPSPEED"}, "warn"),
        ({}, [*LAUNCH, "--cpu", "--use_deepspeed", "recipe.yaml"], {}, "warn"),
    ],
)
def test_deepspeed_on_the_cpu(monkeypatch, env, words, defaults, status):
    monkeypatch.setattr(launchers, "launcher_words", lambda: words)
    monkeypatch.setattr(launchers, "accelerate_defaults", lambda: defaults)
    finding = doctor.check_deepspeed_on_cpu(env)
    assert finding.status == status and ("unset ACCELERATE_USE_CPU" in finding.text) == (status == "warn")


def test_a_lock_that_a_killed_build_left(tmp_path):
    env, lock = {"TORCH_EXTENSIONS_DIR": str(tmp_path)}, tmp_path / "py311_cpu/shm/lock"
    assert launchers.check_build_locks(env).status == "ok"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert launchers.check_build_locks(env).status == "ok"  # somebody is building
    os.utime(lock, (0, 0))
    finding = launchers.check_build_locks(env)
    assert finding.status == "warn" and str(lock) in finding.text and "delete it" in finding.text


@pytest.mark.parametrize(
    ("env", "words", "defaults", "status"),
    [
        ({}, [], {}, "ok"),
        ({}, [*LAUNCH, "--cpu", "--num_processes", "2"], {}, "warn"),
        ({}, [*LAUNCH, "--cpu", "--num-processes=2"], {}, "warn"),
        ({}, [*LAUNCH, "--cpu", "--num_processes", "1"], {}, "ok"),
        ({}, [*LAUNCH, "--multi_gpu", "--num_processes", "2"], {}, "ok"),
        ({"WORLD_SIZE": "2"}, [*LAUNCH, "--cpu", "--num_processes", "2"], {}, "ok"),
        ({}, [*LAUNCH, "--cpu", "--num_processes", "2", "--mpirun_hostfile", "hosts"], {}, "ok"),
        ({}, [], {"use_cpu": True, "num_processes": 4}, "warn"),
    ],
)
def test_processes_that_are_not_started(monkeypatch, env, words, defaults, status):
    monkeypatch.setattr(launchers, "launcher_words", lambda: words)
    monkeypatch.setattr(launchers, "accelerate_defaults", lambda: defaults)
    finding = doctor.check_processes(env)
    assert finding.status == status and ("starts one; use torchrun" in finding.text) == (status == "warn")


def test_a_world_size_that_was_left_behind():
    finding = doctor.check_rendezvous({"WORLD_SIZE": "4", "LOCAL_RANK": "0"})
    assert (finding.status, finding.text.partition(";")[0]) == ("warn", "WORLD_SIZE=4 but no MASTER_ADDR")
    whole = {"WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    assert doctor.check_rendezvous(whole).status == doctor.check_rendezvous({}).status == "ok"


def test_the_launcher_above_is_read(monkeypatch):
    monkeypatch.undo()  # the fixture replaced what is tested here
    lines = [["bash"], [*LAUNCH, "--cpu", "recipe.yaml"]]
    parents = [SimpleNamespace(pid=i, cmdline=lambda line=line: line) for i, line in enumerate(lines)]
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(parents=lambda: parents))
    assert launchers.launcher_words() == lines[1]
    monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(parents=lambda: parents[:1]))
    assert launchers.launcher_words() == []


def test_saved_settings_of_accelerate_are_read(monkeypatch, tmp_path):
    monkeypatch.undo()
    file = tmp_path / "default_config.yaml"
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(file))
    assert launchers.accelerate_defaults() == {}
    file.write_text("use_cpu: true\nnum_processes: 2\n")
    assert launchers.accelerate_defaults() == {"use_cpu": True, "num_processes": 2}


def test_a_crash_inside_a_check_names_the_exception(caplog):
    finding = examine("x", lambda: 1 / 0)
    assert finding.line() == "FAIL  x: ZeroDivisionError: division by zero; the check itself stopped here"
    assert "the check of x stopped" in caplog.text


def test_the_memory_table_is_printed(capsys):
    words = ["--memory", str(ROOT / "recipes" / "shapes_gcpo.yaml"), "--per_device_train_batch_size", "16"]
    assert main(["doctor", *words, "--prompt-tokens", "20"]) == 0
    said = capsys.readouterr().out
    assert "| GiB a device | shapes_gcpo | how |" in said and "16 images x 2 (guidance)" in said
    assert "1 device, no ZeRO, 20 prompt tokens." in said


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--max_steps", "3"], "unknown words --max_steps 3; --key value belongs behind --memory RECIPE"),
        (["--memory", "no_such.yaml"], "there is no recipe 'no_such.yaml'"),
        (["--memory", str(ROOT / "recipes" / "shapes_gcpo.yaml"), "--wieght_clip", "1"], "did you mean weight_clip"),
        (["--memory", str(ROOT / "recipes" / "shapes_gcpo.yaml"), "--gpus", "0"], "gpus=0 must be at least 1"),
    ],
)
def test_a_mistake_is_exit_code_2(capsys, words, says):
    with pytest.raises(SystemExit) as ended:
        main(["doctor", *words])
    assert ended.value.code == 2 and says in capsys.readouterr().err
