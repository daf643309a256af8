"""LoRA on an image policy: what is adapted, against which reference, and that plain PEFT reads what is saved."""

import importlib

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from tiny import PROMPTS, TOKENS, digits, janus_trainer, load_janus, record, settings, shape_prompts, text_prompts
from torch.testing import assert_close
from transformers import BitsAndBytesConfig, JanusForConditionalGeneration

from gcpo_trl import GCPOTrainer
from gcpo_trl.policies.janus import JanusPolicy
from gcpo_trl.rollout import Sampling, sample
from gcpo_trl.trainer.trainable_modules import SKIPPED, default_quantization, train_report


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
    # The rollout's log-probabilities and the reference's are sums in another order.
    weights = [entry["gcpo/weight/mean"] for entry in trainer.state.log_history[:3]]
    assert_close(weights[0], 1.0, rtol=0, atol=1e-6)
    assert abs(weights[2] - 1.0) > 1e-4


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
    weights = [entry["gcpo/weight/mean"] for entry in trainer.state.log_history[:2]]
    assert_close(weights[0], 1.0, rtol=0, atol=1e-6)
    assert abs(weights[1] - 1.0) > 1e-4
    states = trainer.model.state_dict()
    copies = {name for name in states if ".ref." in name}
    assert len(copies) == 28
    loaded = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in copies:
        assert torch.equal(states[name], loaded[name.replace(".ref.", ".")])
    assert len(kept.gradients) == 2 and all(".default." in name for name in kept.gradients[0])


# QLoRA

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}


@pytest.fixture
def nf4():
    pytest.importorskip("bitsandbytes", reason="install gcpo_trl[qlora]")
    return BitsAndBytesConfig(**NF4)


def qlora_trainer(model, folder, dataset, init=None, quantization=None, **changes):
    args = settings(folder, model_init_kwargs=init, learning_rate=1e-2, **changes)
    lora = LoraConfig(r=2, lora_alpha=8)
    return GCPOTrainer(model, digits, args, dataset, peft_config=lora, quantization_config=quantization)


def quantised(model):
    """The 4 bit layers by name, as they were before an adapter came around them."""
    layers = ((name.removeprefix("base_model.model."), module) for name, module in model.named_modules())
    return {name.removesuffix(".base_layer"): one for name, one in layers if type(one).__name__ == "Linear4bit"}


def adapters_and_base(trainer):
    """Copies of what an adapter adds and of all the rest, with the scales and codes of quantised weights."""
    state = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    adapters = {name: value for name, value in state.items() if "lora_" in name}
    return adapters, {name: value for name, value in state.items() if name not in adapters}


@pytest.mark.parametrize("where", ["argument", "model_init_kwargs"])
def test_qlora_trains_an_image_policy_whose_language_model_alone_is_quantised(tiny_janus, tmp_path, nf4, where):
    given = {"quantization": nf4} if where == "argument" else {"init": {"quantization_config": NF4}}
    trainer = qlora_trainer(tiny_janus, tmp_path, shape_prompts(), max_steps=2, beta=0.0, **given)
    # Two layers of seven linear maps, every one under an adapter; the image head, the aligner and the VQ are whole.
    layers = quantised(trainer.model)
    assert len(layers) == 14 and all(".language_model." in name for name in layers)
    adapters, base = adapters_and_base(trainer)
    assert {name.partition("base_model.model.")[2].split(".lora_")[0] for name in adapters} == set(layers)
    assert nf4.llm_int8_skip_modules is None  # the user's own is left as it was
    kept = record(trainer)
    trainer.train()
    after, still = adapters_and_base(trainer)
    assert all(not torch.equal(after[name], adapters[name]) for name in adapters)
    assert all(torch.equal(still[name], base[name]) for name in base)
    assert [image.size for image in trainer._images] == [(36, 36)] * 4 and len(kept.batches) == 2
    # The reference is the quantised base, under an adapter that is switched off.
    assert trainer.state.log_history[0]["gcpo/weight/mean"] == 1.0 != trainer.state.log_history[1]["gcpo/weight/mean"]


def test_qlora_trains_a_text_model(tiny_text, tmp_path, nf4):
    trainer = qlora_trainer(
        *(tiny_text, tmp_path, text_prompts()),
        quantization=nf4,
        max_steps=2,
        max_completion_length=16,
    )
    assert len(quantised(trainer.model)) == 14  # all but the text head, as transformers has it
    adapters, base = adapters_and_base(trainer)
    trainer.train()
    after, still = adapters_and_base(trainer)
    assert sum(not torch.equal(after[name], adapters[name]) for name in adapters) == len(adapters) == 8
    assert all(torch.equal(still[name], base[name]) for name in base)


def test_gradients_pass_4_bit_layers_that_have_drawn(tiny_janus, tmp_path, nf4):
    # On a CPU with AVX512-BF16, bitsandbytes packs them for inference, after which no gradient would reach x.
    trainer = qlora_trainer(tiny_janus, tmp_path, shape_prompts(), quantization=nf4)
    trainer.train()
    layer = quantised(trainer.model)["model.language_model.layers.0.mlp.up_proj"]
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()  # the gradient of each row is the sum of the weight's rows
    weight = importlib.import_module("bitsandbytes.functional").dequantize_4bit(
        layer.weight.data, layer.weight.quant_state
    )
    assert_close(x.grad, weight.float().sum(0).expand(3, 32), rtol=1e-5, atol=1e-5)


def test_quantised_weights_are_counted_whole(tiny_janus, tmp_path, nf4):
    whole = sum(parameter.numel() for parameter in load_janus(tiny_janus)[0].parameters())
    trainer = qlora_trainer(tiny_janus, tmp_path, shape_prompts(), quantization=nf4)
    # Rank 2 beside 4 maps of 32 x 32 and 3 of 32 x 96 in each of two layers: 2 * 2 * (4 * 64 + 3 * 128).
    assert f"training 2,560 of {whole + 2560:,} parameters" in train_report(trainer.model)


def test_what_is_quantised_can_be_chosen(shared_policy, nf4):
    config, args = shared_policy.model.config, settings("unused")
    nf4.llm_int8_skip_modules = ["lm_head"]
    assert default_quantization(nf4, config, args) is nf4
    assert default_quantization({**NF4, SKIPPED: []}, config, args)[SKIPPED] == []
    assert default_quantization({"quant_method": "fp8"}, config, args) == {"quant_method": "fp8"}
    assert default_quantization(None, config, args) is None
    modules = {name for name, _ in shared_policy.model.named_modules()}
    assert set(default_quantization(NF4, config, args)[SKIPPED]) < modules


@pytest.mark.parametrize("model", ["tiny_janus", "tiny_text"])
def test_quantised_weights_without_an_adapter_are_refused_before_they_load(request, tmp_path, monkeypatch, nf4, model):
    path = request.getfixturevalue(model)
    monkeypatch.setattr("trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: pytest.fail("loaded"))
    for given in ({"quantization_config": nf4}, {}):
        args = settings(tmp_path, model_init_kwargs=None if given else {"quantization_config": NF4})
        with pytest.raises(ValueError, match=r"without peft_config leaves nothing to train.*--use_peft true"):
            GCPOTrainer(path, digits, args, shape_prompts(), **given)


@torch.no_grad()
def scores_of(trainer, batch):
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, TOKENS)[0]
