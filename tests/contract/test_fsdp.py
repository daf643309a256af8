"""Sampling from a model that FSDP2 shards, in one process: parameters must be whole outside their layer's forward."""

import pytest
import torch
import torch.distributed as dist
from tiny import PROMPTS, load_janus
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from gcpo_trl import trl_compat
from gcpo_trl.policies.janus import JanusPolicy
from gcpo_trl.rollout import Sampling, sample


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_sharded_model_draws_what_the_whole_one_draws(tiny_janus, one_process):
    def draw(model):
        return sample(JanusPolicy(model, processor), PROMPTS, 0, [0, 1], Sampling(guidance_scale=3.0)).tokens

    model, processor = load_janus(tiny_janus)
    expected = draw(model.eval())
    for layer in model.model.language_model.layers:
        fully_shard(layer, mesh=one_process)
    # As accelerate shards: the embedding by itself, the last norm with the text head, the rest with the root.
    fully_shard(model.model.language_model.embed_tokens, mesh=one_process)
    fully_shard([model.model.language_model.norm, model.lm_head], mesh=one_process, reshard_after_forward=False)
    fully_shard(model, mesh=one_process, reshard_after_forward=False)
    weight = model.model.language_model.layers[0].mlp.up_proj
    assert isinstance(weight.weight, DTensor)
    with trl_compat.unsharded(model):
        assert torch.equal(draw(model), expected)
    assert isinstance(weight.weight, DTensor)  # sharded again

    # What follows in a step: the root's own forward and backward, and another rollout.
    policy = JanusPolicy(model, processor)
    policy.attach_head(model, 1.0)
    encoded = policy.encode(PROMPTS)
    ids, mask = torch.cat([encoded.ids, expected], 1), torch.cat([encoded.mask, torch.ones_like(expected)], 1)
    scores = model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    scores.log_probs.sum().backward()
    assert isinstance(weight.weight.grad, DTensor) and weight.weight.grad.to_local().abs().sum() > 0
    with trl_compat.unsharded(model):
        assert torch.equal(draw(model), expected)
