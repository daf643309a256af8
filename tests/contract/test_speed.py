"""What is fast trains what is plain: engine against reference, selected positions against all of them."""

import pytest
import torch
from tiny import janus_trainer, record
from torch.testing import assert_close


def trained(path, folder, **changes):
    """Record and parameters of three steps."""
    trainer = janus_trainer(path, folder, max_steps=3, **changes)
    kept = record(trainer)
    trainer.train()
    return kept, dict(trainer.model.named_parameters()), trainer.state.log_history


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_training_with_the_engine_is_training_with_the_reference(tiny_janus, tmp_path, guidance):
    fast, weights, _ = trained(tiny_janus, tmp_path, rollout_backend="eager", rollout_guidance_scale=guidance)
    plain, expected, _ = trained(tiny_janus, tmp_path, rollout_backend="reference", rollout_guidance_scale=guidance)
    for one, other in zip(fast.batches, plain.batches, strict=True):
        assert torch.equal(one["completion_ids"], other["completion_ids"])
        assert torch.equal(one["tool_mask"], other["tool_mask"])
    assert_close(fast.losses, plain.losses, rtol=0, atol=1e-6)
    for name, weight in weights.items():
        assert_close(weight, expected[name], rtol=0, atol=1e-6, msg=name)
