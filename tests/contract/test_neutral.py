"""Neutral settings are GRPO: the same losses, gradient norms, metrics and parameters, to the last bit.

Also that the rest of GCPO is not neutral, so that the comparison means something.
"""

import pytest
import torch
from tiny import text_prompts
from trl import GRPOConfig, GRPOTrainer

from gcpo_trl import GCPOConfig, GCPOTrainer

NEUTRAL = {"select_strategies": ["everything"], "weight_form": "none"}
STEPS = 3
NOT_COMPARED = ("time", "runtime", "per_second", "gcpo/")


def variety(prompts, completions, **columns):
    """How many different words a completion has."""
    return [float(len(set(completion.split()))) for completion in completions]


def trained(trainer_class, config_class, model, folder, **settings):
    """Log and parameters after three steps."""
    args = config_class(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=8,
        max_steps=STEPS,
        learning_rate=1e-2,
        logging_steps=1,
        beta=0.04,
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        disable_tqdm=True,
        seed=3,
        **settings,
    )
    trainer = trainer_class(model, [variety], args, text_prompts())
    trainer.train()
    log = [
        {key: value for key, value in entry.items() if not any(part in key for part in NOT_COMPARED)}
        for entry in trainer.state.log_history
    ]
    return log, {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def assert_same(one, other):
    assert one[0] == other[0]
    assert one[1].keys() == other[1].keys()
    differ = [name for name in one[1] if not torch.equal(one[1][name], other[1][name])]
    assert differ == []


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_neutral_settings_are_grpo_exactly(tiny_text, tmp_path, loss_type):
    theirs = trained(GRPOTrainer, GRPOConfig, tiny_text, tmp_path, loss_type=loss_type)
    ours = trained(GCPOTrainer, GCPOConfig, tiny_text, tmp_path, loss_type=loss_type, **NEUTRAL)
    assert_same(ours, theirs)
    losses = [entry["loss"] for entry in theirs[0] if "loss" in entry]
    assert len(losses) == STEPS and len({*losses}) == STEPS
    assert all(entry["grad_norm"] > 0 for entry in theirs[0] if "loss" in entry)


def test_a_plain_grpo_config_is_grpo_exactly(tiny_text, tmp_path, caplog):
    settings = {"num_iterations": 2, "gradient_accumulation_steps": 2}
    theirs = trained(GRPOTrainer, GRPOConfig, tiny_text, tmp_path, **settings)
    ours = trained(GCPOTrainer, GRPOConfig, tiny_text, tmp_path, **settings)
    assert_same(ours, theirs)
    assert "args is a GRPOConfig: training is plain GRPO; pass a GCPOConfig" in caplog.text


@pytest.mark.parametrize(
    "settings",
    [{"weight_form": "none"}, {"select_strategies": ["everything"], "weight_detach": False}],
    ids=["critical tokens", "weight"],
)
def test_each_half_of_the_method_alone_is_not_grpo(tiny_text, tmp_path, settings):
    theirs = trained(GRPOTrainer, GRPOConfig, tiny_text, tmp_path)
    ours = trained(GCPOTrainer, GCPOConfig, tiny_text, tmp_path, **({"select_fraction": 0.2} | settings))
    assert any(not torch.equal(ours[1][name], theirs[1][name]) for name in theirs[1])
    assert all(value.isfinite().all() for value in ours[1].values())
