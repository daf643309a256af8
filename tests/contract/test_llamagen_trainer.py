"""GCPO on LlamaGen: the same trainer, from its first loss to a checkpoint that draws the same images."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny import disturb, janus_trainer, record
from transformers import AutoModelForCausalLM

from gcpo_trl.models import LlamaGenForImageGeneration
from gcpo_trl.policies.llamagen import load
from gcpo_trl.rollout import Sampling, sample

PROMPT = "a photo of a red circle"


def pictures(policy):
    return sample(policy, [PROMPT] * 2, 0, [0, 1], Sampling(guidance_scale=2.0)).tokens


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_first_loss_is_the_formula(tiny_llamagen, tmp_path, guidance):
    # Before any step the ratio and the weight are 1, so the loss is minus the mean advantage of the critical tokens,
    # which is 0 in each group, plus beta times a KL of 0.
    trainer = janus_trainer(tiny_llamagen, tmp_path, rollout_guidance_scale=guidance)
    kept = record(trainer)
    trainer.train()
    (batch,) = kept.batches
    assert batch["tool_mask"].sum(dim=1).tolist() == [24] * 4  # 3 x 8 of 81 tokens
    assert kept.losses[0] == pytest.approx(0.0, abs=1e-5)
    moved = {name for name, gradient in kept.gradients[0].items() if gradient.any()}
    assert {"lm_head.weight", "model.condition.fc1.weight", "model.embed_tokens.weight"} <= moved
    assert not any(name.startswith("vqmodel") for name in kept.gradients[0])


def test_scored_without_gradient_they_are_the_log_probabilities_of_the_rollout(tiny_llamagen, tmp_path):
    trainer = janus_trainer(tiny_llamagen, tmp_path, beta=0.04)
    kept = record(trainer)
    disturb(trainer.model)
    trainer.train()
    (batch,) = kept.batches
    policy, ids = trainer.policy, torch.cat([kept.batches[0]["prompt_ids"], batch["completion_ids"]], dim=1)
    reference = load(tiny_llamagen)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    with torch.no_grad():
        expected = reference.teacher_forced(reference.model, ids, mask, 1.0).log_probs
    torch.testing.assert_close(batch["ref_per_token_logps"], expected, rtol=0, atol=1e-4)
    assert policy.text_encoder.name == reference.text_encoder.name


def test_a_checkpoint_draws_the_same_images(tiny_llamagen, tmp_path):
    trainer = janus_trainer(tiny_llamagen, tmp_path, select_similarity_space="codebook", max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = load(str(tmp_path / "saved"))
    assert torch.equal(pictures(again), pictures(trainer.policy))
    assert not torch.equal(pictures(again), pictures(load(tiny_llamagen)))
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "saved"), LlamaGenForImageGeneration)


def test_an_adapter_is_saved_and_reloaded(tiny_llamagen, tmp_path):
    adapter = LoraConfig(r=4, lora_alpha=64)
    trainer = janus_trainer(tiny_llamagen, tmp_path, peft_config=adapter, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(names) == 2 * 7 * 2 and all(".layers." in name for name in names)
    drawn, base = pictures(trainer.policy), load(tiny_llamagen)
    before = pictures(base)
    PeftModel.from_pretrained(base.model, tmp_path / "adapter")
    assert torch.equal(pictures(base), drawn) and not torch.equal(before, drawn)


def test_gradient_checkpointing_changes_nothing(tiny_llamagen, tmp_path):
    def gradients(**changes):
        trainer = janus_trainer(tiny_llamagen, tmp_path, **changes)
        kept = record(trainer)
        trainer.train()
        return kept.gradients[0]

    plain, again = gradients(), gradients(gradient_checkpointing=True)
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)


def test_generate_of_transformers_says_who_draws(tiny_llamagen):
    with pytest.raises(NotImplementedError, match="gcpo sample"):
        load(tiny_llamagen).model.generate()
