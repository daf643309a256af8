"""LoRA on an image policy: what is adapted, against which reference, and that plain PEFT reads what is saved."""

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny import PROMPTS, TOKENS, janus_trainer, load_janus, record
from torch.testing import assert_close
from transformers import JanusForConditionalGeneration

from gcpo_trl.policies.janus import JanusPolicy
from gcpo_trl.rollout import Sampling, sample


def test_lora_trains_against_its_base(tiny_janus, tmp_path):
    peft = LoraConfig(r=2, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    trainer = janus_trainer(tiny_janus, tmp_path, peft_config=peft, max_steps=3, beta=0.0, learning_rate=1e-2)
    base = load_janus(tiny_janus)[0].state_dict()
    kept = record(trainer)
    trainer.train()
    assert trainer.ref_model is None
    adapters = {name: p for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert len(adapters) == 8 and all("lora_" in name for name in adapters)
    assert all(p.abs().sum() > 0 for name, p in adapters.items() if "lora_B" in name)  # zero at the start
    frozen = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in trainer.model.named_parameters()
        if "lora_" not in name
    }
    assert len(frozen) > 100 and all(torch.equal(p, base[name]) for name, p in frozen.items())
    # The reference of the last batch is the base: the adapter, by then in place, is switched off.
    with trainer.model.disable_adapter():
        expected = scores_of(trainer, kept.batches[-1])
    assert_close(kept.batches[-1]["ref_per_token_logps"], expected, rtol=0, atol=1e-6)
    assert (scores_of(trainer, kept.batches[-1]) - expected).abs().max() > 1e-3
    assert trainer.state.log_history[0]["gcpo/weight/mean"] == 1.0 != trainer.state.log_history[2]["gcpo/weight/mean"]


@pytest.mark.parametrize(("parts", "adapted"), [(None, 14), (["language_model", "generation_head"], 16)])
def test_lora_adapts_the_parts_that_train_and_never_the_image_tokenizer(tiny_janus, tmp_path, parts, adapted):
    # Two layers of seven linear maps each; the head has two.
    trainer = janus_trainer(tiny_janus, tmp_path, peft_config=LoraConfig(r=2), train_modules=parts)
    names = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * adapted and all("lora_" in name for name in names)
    wrapped = {name.split("lora_")[0] for name in names}
    assert len(wrapped) == adapted and not any(
        "vision" in name or "vqmodel" in name for name in wrapped if parts is None
    )
    assert all(".language_model." in name or ".generation_head." in name for name in wrapped)


def test_lora_cannot_adapt_a_part_without_linear_layers(tiny_janus, tmp_path):
    with pytest.raises(ValueError, match="'generation_embeddings', which LoRA cannot adapt; use language_model, gen"):
        janus_trainer(tiny_janus, tmp_path, peft_config=LoraConfig(r=2), train_modules=["generation_embeddings"])


def test_an_adapter_is_reloaded_and_merged_by_plain_peft(tiny_janus, tmp_path):
    trainer = janus_trainer(tiny_janus, tmp_path, peft_config=LoraConfig(r=2, lora_alpha=8), learning_rate=3e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert {"adapter_model.safetensors", "adapter_config.json"} <= {f.name for f in (tmp_path / "adapter").iterdir()}

    def images(model):
        policy = JanusPolicy(model, load_janus(tiny_janus)[1])
        return sample(policy, PROMPTS, 0, [0, 1], Sampling(guidance_scale=3.0)).tokens

    trained = images(trainer.policy.model.eval())
    again = PeftModel.from_pretrained(load_janus(tiny_janus)[0], tmp_path / "adapter").eval()
    assert torch.equal(images(again.get_base_model()), trained)
    assert not torch.equal(images(load_janus(tiny_janus)[0].eval()), trained)
    merged = again.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    plain = JanusForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(images(plain), trained)


def test_an_adapter_trains_on_against_a_frozen_copy_of_itself(tiny_janus, tmp_path):
    first = janus_trainer(tiny_janus, tmp_path, peft_config=LoraConfig(r=2, lora_alpha=8), learning_rate=3e-2)
    first.train()
    first.save_model(str(tmp_path / "adapter"))
    model = PeftModel.from_pretrained(load_janus(tiny_janus)[0], tmp_path / "adapter", is_trainable=True)
    trainer = janus_trainer(
        model, tmp_path, processor=load_janus(tiny_janus)[1], beta=0.0, learning_rate=3e-2, max_steps=2
    )
    kept = record(trainer)
    trainer.train()
    # Both start from the loaded adapter, so the first batch is scored alike; the copy stays while the adapter moves.
    assert trainer.state.log_history[0]["gcpo/weight/mean"] == 1.0 != trainer.state.log_history[1]["gcpo/weight/mean"]
    states = trainer.model.state_dict()
    copies = {name for name in states if ".ref." in name}
    assert len(copies) == 28
    loaded = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in copies:
        assert torch.equal(states[name], loaded[name.replace(".ref.", ".")])
    assert len(kept.gradients) == 2 and all(".default." in name for name in kept.gradients[0])


@torch.no_grad()
def scores_of(trainer, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, TOKENS)[0]
