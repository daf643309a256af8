"""A run that goes on from a checkpoint is the run that was never interrupted, also inside a rollout buffer."""

import json
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny import janus_trainer, record, settings
from torch.testing import assert_close

from gcpo_trl.trainer.masks import loss_mask, policy_mask
from gcpo_trl.trainer.resume import (
    ExactResume,
    check_reference,
    is_whole,
    last_whole_checkpoint,
    load_buffer,
    save_buffer,
)

SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
# 8 images a generation in 2 slices, each used twice: steps 1 to 4 share one generation.
BUFFER = {"num_iterations": 2, "steps_per_generation": 2}
NUMBERS = ("loss", "reward", "reward_std", "grad_norm", "kl", "gcpo/weight/mean", "num_tokens")


def adapter():
    return LoraConfig(r=2, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")


def logged(trainer):
    return [{key: entry.get(key) for key in NUMBERS} for entry in trainer.state.log_history if "loss" in entry]


def images(kept):
    return [batch["completion_ids"].tolist() for batch in kept.batches]


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("step", "changes", "generations"), [(2, {}, 3), (3, BUFFER, 1), (4, BUFFER, 1)], ids=["free", "inside", "between"]
)
def test_a_continued_run_is_the_uninterrupted_one(tiny_janus, tmp_path, lora, step, changes, generations):
    def build():
        peft = adapter() if lora else None
        return janus_trainer(tiny_janus, tmp_path, peft_config=peft, learning_rate=1e-3, **SAVED, **changes)

    whole = build()
    before = record(whole)
    whole.train()
    again = build()
    after = record(again)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))

    assert logged(again) == logged(whole)
    assert after.losses == before.losses[step:]
    assert len(after.batches) == generations and images(after) == images(before)[-generations:]
    expected, found = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# The reference takes 0.6 of the policy after steps 2 and 4, so at step 3 it is neither the start nor the policy.
MOVING = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.6}


def test_a_reference_that_moves_goes_on_from_where_it_was(tiny_janus, tmp_path):
    whole = janus_trainer(tiny_janus, tmp_path, learning_rate=1e-2, **SAVED, **MOVING)
    start = {name: value.clone() for name, value in whole.ref_model.state_dict().items()}
    before = record(whole)
    whole.train()
    kept = load_file(tmp_path / "checkpoint-3" / "reference.safetensors")
    policy = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    expected = {name: 0.4 * start[name] + 0.6 * policy[name] for name in kept if start[name].is_floating_point()}
    assert_close({name: kept[name] for name in expected}, expected, rtol=1e-5, atol=1e-6)
    name = "model.language_model.norm.weight"
    assert (kept[name] - start[name]).abs().max() > 1e-3 < (kept[name] - policy[name]).abs().max()
    again = janus_trainer(tiny_janus, tmp_path, learning_rate=1e-2, **SAVED, **MOVING)
    after = record(again)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(again) == logged(whole) and after.losses == before.losses[3:]
    end, found = whole.ref_model.state_dict(), again.ref_model.state_dict()
    assert all(torch.equal(found[name], end[name]) for name in end)


def test_a_moving_reference_that_is_lost_is_refused(tiny_janus, tmp_path):
    janus_trainer(tiny_janus, tmp_path, **SAVED).train()  # nothing moved its reference, so none was saved
    assert not (tmp_path / "checkpoint-1" / "reference.safetensors").exists()
    trainer = janus_trainer(tiny_janus, tmp_path, **SAVED, **MOVING)
    with pytest.raises(ValueError, match=r"checkpoint-1 has no reference.safetensors.*; set it to False to go on"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_a_moving_reference_in_parts_is_refused_where_it_would_be_saved(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, **SAVED, **MOVING)
    next(trainer.ref_model.parameters()).ds_tensor = torch.zeros(1)  # as ZeRO-3 marks what a process has a part of
    with pytest.raises(ValueError, match=r"a reference that is sharded.*train with ddp or zero2"):
        trainer.train()
    for unkept in ({"save_strategy": "no"}, {"save_only_model": True}):
        check_reference(trainer.ref_model, settings(tmp_path, **(SAVED | unkept)), None)


def test_a_quantised_model_goes_on_with_its_adapter_as_it_was(tiny_janus, tmp_path):
    pytest.importorskip("bitsandbytes", reason="install gcpo_trl[qlora]")
    four_bit = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}

    def build():
        return janus_trainer(
            *(tiny_janus, tmp_path), peft_config=adapter(), learning_rate=1e-2, model_init_kwargs=four_bit, **SAVED
        )

    whole, again = build(), build()
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert logged(again) == logged(whole)
    expected, found = whole.model.state_dict(), again.model.state_dict()
    adapters = [name for name in expected if "lora_" in name]
    assert len(adapters) == 8 and {found[name].dtype for name in adapters} == {torch.bfloat16}
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_buffer_comes_back_as_it_was(tmp_path):
    batch = {"ids": torch.arange(6).view(2, 3), "advantages": torch.tensor([0.5, -0.5])}
    halves = [{key: value[i : i + 1] for key, value in batch.items()} | {"images": None, "turns": [i]} for i in (0, 1)]
    save_buffer(tmp_path / "new", rank=1, world=2, step=7, buffer=halves)
    step, found = load_buffer(tmp_path / "new", rank=1, world=2, device=torch.device("cpu"))
    assert step == 7 and [part["turns"] for part in found] == [[0], [1]] and found[0]["images"] is None
    assert all(torch.equal(part[key], half[key]) for part, half in zip(found, halves, strict=True) for key in batch)
    assert sorted(path.suffix for path in (tmp_path / "new").iterdir()) == [".json", ".safetensors"]


def test_a_buffer_of_other_ranks_is_not_used(tmp_path, caplog):
    save_buffer(tmp_path, rank=0, world=2, step=7, buffer=[])
    assert load_buffer(tmp_path, rank=0, world=1, device=torch.device("cpu")) is None
    assert "was written by 2 ranks, this run has 1" in caplog.text
    assert load_buffer(tmp_path, rank=1, world=2, device=torch.device("cpu")) is None
    assert "holds no rollout buffer" in caplog.text


def test_a_checkpoint_cut_short_is_passed_over(tiny_janus, tmp_path, caplog):
    trainer = janus_trainer(tiny_janus, tmp_path, **SAVED)
    with pytest.raises(ValueError, match=r"'None' is no checkpoint .* the last one in .* is None"):
        trainer.train(resume_from_checkpoint=True)
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_st'), (11, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-old").mkdir()
    assert last_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-9"
    assert "checkpoint-10 was not saved to its end" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint-11' is no checkpoint .* is .*checkpoint-9"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-11"))


def test_a_checkpoint_written_over_an_old_one_is_not_whole_before_its_end(tiny_janus, tmp_path, monkeypatch):
    # A run started anew in the folder of an old one, killed while it saves.
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": 1}))
    trainer = janus_trainer(tiny_janus, tmp_path, **SAVED)

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "save_model", killed)
    assert is_whole(folder)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not is_whole(folder)


def test_the_state_of_the_trainer_is_written_last(tiny_janus, tmp_path, monkeypatch):
    trainer = janus_trainer(tiny_janus, tmp_path, **(SAVED | {"max_steps": 1}))
    seen = []
    wait = trainer.accelerator.wait_for_everyone
    monkeypatch.setattr(
        trainer.accelerator,
        "wait_for_everyone",
        lambda: (seen.append(sorted(path.name for path in (tmp_path / "checkpoint-1").glob("*"))), wait())[1],
    )
    trainer.train()
    present = next(names for names in seen if "rollout_0.json" in names)
    assert {"model.safetensors", "optimizer.pt", "rng_state.pth", "rollout_0.safetensors"} <= set(present)
    assert "trainer_state.json" not in present and is_whole(tmp_path / "checkpoint-1")
    card = (tmp_path / "README.md").read_text()  # TRL writes one with every checkpoint
    assert "gcpo sample --model" in card and "| `rollout_guidance_scale` | `3.0` |" in card


def test_files_of_an_older_run_do_not_stay_in_a_checkpoint(tiny_janus, tmp_path):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "rollout_1.json").write_text("{}")
    trainer = janus_trainer(tiny_janus, tmp_path, **(SAVED | {"max_steps": 1, "save_only_model": True}))
    trainer.train()
    assert is_whole(folder) and not list(folder.glob("rollout_*"))


def test_processes_that_would_go_on_from_different_steps_are_stopped(tmp_path, monkeypatch):
    # A machine without the disk of the first one sees no checkpoint and would start anew.
    run = object.__new__(ExactResume)
    run.args, run.accelerator = SimpleNamespace(output_dir=tmp_path), SimpleNamespace(num_processes=2)
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    monkeypatch.setattr("gcpo_trl.trainer.resume.gather_object", lambda mine: [*mine, "the start"])
    with pytest.raises(ValueError, match=r"go on from \['.*checkpoint-3', 'the start'\]; use a disk that all machines"):
        run.train(resume_from_checkpoint=True)


def test_a_buffer_saved_under_former_names_keeps_its_masks(tmp_path):
    drawn, critical = torch.tensor([[True, True]]), torch.tensor([[1, 0]])
    old = {"drawn_mask": drawn, "drawn_items_in_batch": torch.tensor(2), "tool_mask": critical}
    save_buffer(tmp_path, 0, 1, 3, [old | {"completion_mask": torch.ones(1, 2)}])
    step, (batch,) = load_buffer(tmp_path, 0, 1, torch.device("cpu"))
    assert step == 3 and batch["policy_items_in_batch"] == 2
    assert torch.equal(policy_mask(batch), drawn) and torch.equal(loss_mask(batch), critical.bool())
