"""What is fast trains what is plain: engine against reference, selected positions against all of them."""

import contextlib
import gzip
import json

import pytest
import torch
from tiny import disturb, janus_trainer, load_janus, record, settings, text_prompts
from torch.testing import assert_close

from gcpo_trl import GCPOTrainer
from gcpo_trl.policies.decoding.image_head import Scored
from gcpo_trl.runs.build import Trace
from gcpo_trl.trainer.selected_logps import LOGPS


def trained(path, folder, **changes):
    """Record and parameters of three steps."""
    trainer = janus_trainer(path, folder, max_steps=3, **changes)
    kept = record(trainer)
    trainer.train()
    return kept, dict(trainer.model.named_parameters()), trainer.state.log_history


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_training_with_the_engine_is_training_with_the_reference(tiny_janus, tmp_path, guidance):
    # Plain gradient steps: AdamW's first ones have the size of the learning rate, however small a gradient is, and so
    # enlarge what rounding leaves of a zero.
    settings = {"rollout_guidance_scale": guidance, "optim": "sgd", "learning_rate": 0.01}
    fast, weights, _ = trained(tiny_janus, tmp_path, rollout_backend="eager", **settings)
    plain, expected, _ = trained(tiny_janus, tmp_path, rollout_backend="reference", **settings)
    for one, other in zip(fast.batches, plain.batches, strict=True):
        assert torch.equal(one["completion_ids"], other["completion_ids"])
        assert torch.equal(one["tool_mask"], other["tool_mask"])
    assert_close(fast.losses, plain.losses, rtol=0, atol=1e-6)
    start = dict(load_janus(tiny_janus)[0].named_parameters())
    assert max((weights[name] - start[name]).abs().max() for name in weights) > 1e-3
    for name, weight in weights.items():
        assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)


SELECTED = {
    "published": {},
    "no weight": {"weight_form": "none", "beta": 0.0},
    "one update later": {"num_iterations": 2},
    "one update later, no weight": {"num_iterations": 2, "weight_form": "none"},
    "sequence ratios": {"num_iterations": 2, "importance_sampling_level": "sequence", "loss_type": "grpo"},
    "entropy bonus": {"entropy_coef": 0.05},
    "high entropy": {"top_entropy_quantile": 0.5},
}


def first_updates(path, folder, monkeypatch=None, **changes):
    """Losses, gradients and logs of two updates of a disturbed policy, and how many positions the head scored."""
    trainer = janus_trainer(path, folder, max_steps=2, **changes)
    disturb(trainer.model)
    rows = []
    if monkeypatch is not None:

        @contextlib.contextmanager
        def everywhere(policy, *_):
            policy.scored = Scored()
            yield lambda logps: logps

        monkeypatch.setattr("gcpo_trl.trainer.gcpo_trainer.selected_only", everywhere)
    head = trainer.model.model.generation_head
    head.register_forward_hook(lambda module, args, out: rows.append(len(out)) if torch.is_grad_enabled() else None)
    kept = record(trainer)
    trainer.train()
    return kept, rows, trainer.state.log_history


@pytest.mark.parametrize("changes", SELECTED.values(), ids=SELECTED.keys())
def test_a_loss_on_the_selected_positions_is_the_loss_on_all_of_them_masked(tiny_janus, tmp_path, monkeypatch, changes):
    part, few, log = first_updates(tiny_janus, tmp_path, **changes)
    whole, many, expected = first_updates(tiny_janus, tmp_path, monkeypatch, **changes)
    assert few == [4 * 24] * len(few) and many == [4 * 81] * len(many)
    assert_close(part.losses, whole.losses, rtol=0, atol=1e-6)
    for one, other in zip(part.gradients, whole.gradients, strict=True):
        assert one.keys() == other.keys()
        for name, gradient in one.items():
            assert (gradient - other[name]).norm() <= 1e-6 + 1e-5 * other[name].norm(), name
    for one, other in zip(log[:2], expected[:2], strict=True):
        for name in ("entropy", "kl", "gcpo/weight/mean", "clip_ratio/region_mean"):
            assert_close(one.get(name, 0.0), other.get(name, 0.0), rtol=1e-4, atol=1e-5)


def test_log_probabilities_come_from_the_rollout_only_while_they_can(tiny_janus, tmp_path):
    first = record(one := janus_trainer(tiny_janus, tmp_path))
    one.train()
    assert torch.equal(first.batches[0][LOGPS], one._rollout.logps)
    for changes in ({"num_iterations": 2}, {"bf16": True}, {"weight_detach": False}, {"weight_form": "none"}):
        kept = record(other := janus_trainer(tiny_janus, tmp_path, **changes))
        other.train()
        assert LOGPS not in kept.batches[0], changes


def test_the_text_head_has_no_gradient_and_no_optimizer_state(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path)
    trainer.train()
    assert trainer.model.lm_head.weight.grad is None and not trainer.model.lm_head.weight.requires_grad
    held = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert id(trainer.model.lm_head.weight) not in held and len(held) > 10


TIMES = ("rollout", "reward", "reference", "update")


def test_every_run_says_where_its_time_went(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    for entry in trainer.state.log_history[:2]:
        times = {name: entry[f"gcpo/time/{name}"] for name in TIMES}
        assert all(seconds > 0 for seconds in times.values())
        # One generation of 8 images and two micro-batches fill most of what TRL calls the step.
        assert 0.7 * entry["step_time"] < sum(times.values()) <= entry["step_time"]


def test_text_models_are_timed_too(tiny_text, tmp_path):
    args = settings(tmp_path, max_completion_length=6, select_fraction=0.25)
    trainer = GCPOTrainer(
        tiny_text, [lambda completions, **_: [float(len(c)) for c in completions]], args, text_prompts()
    )
    trainer.train()
    assert all(trainer.state.log_history[0][f"gcpo/time/{name}"] > 0 for name in TIMES)


@pytest.mark.parametrize(("steps", "traced"), [(1, "step-000001"), (3, "step-000002")])
def test_a_trace_is_of_one_whole_step(tiny_janus, tmp_path, steps, traced):
    trainer = janus_trainer(tiny_janus, tmp_path, max_steps=steps)
    trainer.add_callback(Trace)
    trainer.train()
    [file] = (tmp_path / "profile").iterdir()
    assert file.name == f"{traced}.json.gz"
    names = {event.get("name") for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]}
    assert {"aten::baddbmm", "aten::searchsorted", "autograd::engine::evaluate_function: MmBackward0"} <= names
