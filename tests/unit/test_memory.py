"""Memory on paper: formulas against sums a reader can redo, and against what a real run of the tiny Janus holds."""

import contextlib

import pytest
import torch
from peft import LoraConfig
from tiny import HIDDEN, LAYERS, PROMPTS, TOKENS, janus_trainer, load_janus
from transformers import TrainerCallback

from gcpo_trl.memory import estimate as memory
from gcpo_trl.memory.estimate import GIB, LOGIT_SAVED, Layer, Row, Run, estimate, kept_by_a_layer, table, total
from gcpo_trl.memory.table import LANGUAGE, config_of, memory_table, meta_model, published_config
from gcpo_trl.policies.decoding.llama_decoder import LlamaDecoder
from gcpo_trl.policies.janus import JanusPolicy, teacher_forced
from gcpo_trl.runs.recipe import parse
from gcpo_trl.shapes.build import CHECKPOINT
from gcpo_trl.trainer.trainable_modules import freeze_all_but

LORA = ["--use_peft", "true", "--lora_r", "4", "--lora_target_modules", ".*language_model.*_proj"]
RECIPES = [f"recipes/janus{size}_{reward}.yaml" for size in ("1b", "7b") for reward in ("geneval", "hpsv2")]


def small_run(**changes):
    defaults = {"rows": 4, "sampled": 4, "guided": True, "prompt": 10, "mixed": False, "checkpointing": False}
    return Run(**(defaults | {"reference": True} | changes))


def meta(name, *words, zero=0):
    """The model of a recipe's words on the meta device."""
    _, args, model_args = parse(["--output_dir", "out", "--use_cpu", "true", *words])
    return meta_model(config_of(name), args, model_args, zero)


def sizes(rows):
    return {row.name: row.size for row in rows}


# arithmetic


def test_a_full_layer_in_fp32():
    # hidden 8, MLP 16, 2 heads, 5 positions; per token, in numbers of 4 bytes:
    # norms 2 x (input 8 + root 1 + normalised 8) = 34; attention q, k, v, out 4 x 8 + mask row 5 + 2 heads = 39;
    # MLP 3 x 16 = 48; read by q, k, v 8, by o what attention keeps, by gate and up 8, by down 16 = 32
    every = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    layer = Layer(8, 8, 8, 16, 2, stream=4, compute=4, full=every)
    assert kept_by_a_layer(layer, seq=5) == 4 * (34 + 39 + 48 + 32)


def test_a_full_layer_under_autocast_and_in_bf16():
    every = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
    # norms stay fp32: 2 x 4 x (8 + 1 + 8) = 136; attention 2 x (32 + 5) + 4 x 2 = 82; MLP 2 x 48 = 96;
    # autocast copies for each of q, k, v, gate and up: 5 x 2 x 8 = 80, and 2 x 16 = 32 for down
    autocast = Layer(8, 8, 8, 16, 2, stream=4, compute=2, full=every)
    assert kept_by_a_layer(autocast, seq=5) == 136 + 82 + 96 + 80 + 32
    # norms: input in fp32 and root 2 x 4 x 9 = 72, normalised 2 x 2 x 8 = 32; read: 2 x (8 + 8 + 16) = 64
    half = Layer(8, 8, 8, 16, 2, stream=2, compute=2, full=every)
    assert kept_by_a_layer(half, seq=5) == 72 + 32 + 82 + 96 + 64


def test_adapters_keep_what_they_read():
    # frozen norms keep no normalised input: 2 x 4 x 9 = 72; attention 4 x 37 + 8 = 156; MLP 4 x 48 = 192;
    # q and v share their input, 4 x 8; each rank 3 adds 4 x 3
    layer = Layer(8, 8, 8, 16, 2, stream=4, compute=4, lora={"q_proj": 3, "v_proj": 3}, norms=False)
    assert kept_by_a_layer(layer, seq=5) == 72 + 156 + 192 + 32 + 24
    # dropout: a copy of its own for each, and a mask of 8 bytes
    layer = Layer(8, 8, 8, 16, 2, stream=4, compute=4, lora={"q_proj": 3, "v_proj": 3}, norms=False, dropout=True)
    assert kept_by_a_layer(layer, seq=5) == 72 + 156 + 192 + 64 + 16 + 24


def test_the_total_takes_the_larger_peak():
    rows = [Row("a", 5, "always", ""), Row("b", 7, "rollout", ""), Row("c", 4, "update", ""), Row("d", 2, "update", "")]
    assert total([*rows, Row("e", 100, "shown", ""), Row("f", None, "always", "")]) == 5 + 7
    assert total([*rows, Row("g", 3, "update", "")]) == 5 + 9


def test_the_table_leaves_out_zeros_and_brackets_what_does_not_count():
    one = [Row("a", 3 * GIB, "always", "why"), Row("b", 0, "always", ""), Row("c", GIB, "shown", "")]
    two = [Row("a", GIB // 2, "always", ""), Row("b", 0, "always", ""), Row("c", None, "always", "")]
    lines = table({"one": one, "two": two}).splitlines()
    assert lines[0] == "| GiB a device | one | two |"
    assert lines[2:] == ["| a | 3.00 | 0.50 |", "| c | (1.00) | not counted |", "| **total** | **3.00** | **0.50** |"]
    assert "| a | 3.00 | why |" in table({"one": one})
    with pytest.raises(ValueError, match="there is no run to show"):
        table({})


# Janus-Pro


def test_the_published_sizes():
    # decoder layers: 24 x (4 x 2048^2 + 3 x 2048 x 5632) and 30 x (4 x 4096^2 + 3 x 4096 x 11008)
    for name, layers, billions in (("Janus-Pro-1B", 1_233_125_376, 2.08), ("Janus-Pro-7B", 6_071_255_040, 7.41)):
        model = meta(f"deepseek-community/{name}")
        projections = [p for n, p in model.named_parameters() if "language_model.layers" in n and "_proj" in n]
        assert sum(p.numel() for p in projections) == layers
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert config_of(f"deepseek-ai/{name}").to_dict() == published_config(name).to_dict()
    assert set(LANGUAGE) == {"Janus-Pro-1B", "Janus-Pro-7B"}


def test_a_recipe_in_full():
    # Janus-Pro-1B in bf16, 8 images a micro-batch: the sums by hand, 2 bytes a number
    model = meta("deepseek-community/Janus-Pro-1B", "--dtype", "bfloat16")
    run = small_run(rows=8, sampled=8, prompt=32, mixed=True, checkpointing=True)
    found = sizes(estimate(model, run))
    trained = 1_233_125_376 + 102400 * 2048 + (2 * 24 + 1) * 2048
    assert found["parameters, trained"] == found["update: gradients"] == 2 * trained
    assert found["optimizer"] == 2 * 2 * trained + 4 * (24 * 9 + 2)  # nine tensors a layer, embeddings, last norm
    assert found["rollout: cache"] == 2 * 24 * (8 * 2) * 640 * 2048 * 2
    assert found["update: logits tile"] == 2048 * 16384 * 20
    assert found["reference model"] == found["parameters, trained"] + found["parameters, frozen"]
    assert found["update: activations, checkpointed"] < found["update: activations"] / 5


def test_lora_trains_adapters_alone():
    words = ["--use_peft", "true", "--lora_r", "16", "--dtype", "bfloat16"]
    model = meta("deepseek-community/Janus-Pro-1B", *words)
    # r x (in + out): q, k, v, o 4 x 4096, gate, up, down 3 x (2048 + 5632); fp32 adapters, as PEFT makes them
    adapters = 24 * 16 * (4 * 4096 + 3 * 7680)
    found = sizes(estimate(model, small_run(mixed=True, reference=False)))
    assert found["parameters, trained"] == found["update: gradients"] == 4 * adapters
    assert found["optimizer"] == 8 * adapters + 4 * (24 * 14)
    assert found["reference model"] == 0


def test_zero_splits_what_deepspeed_splits():
    model = meta("deepseek-community/Janus-Pro-1B", "--dtype", "bfloat16")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    two, three = (sizes(estimate(model, small_run(mixed=True, gpus=4, zero=stage))) for stage in (2, 3))
    assert two["optimizer"] == three["optimizer"] == 12 * trained // 4  # fp32 master and moments
    assert two["update: gradients"] == three["update: gradients"] == 2 * trained // 4
    assert two["parameters, trained"] == 2 * trained and three["parameters, trained"] == 2 * trained // 4
    assert two["reference model"] == 2 * whole and three["reference model"] == 2 * whole // 4
    assert three["rollout: gathered weights"] == 2 * whole and two["rollout: gathered weights"] == 0
    ddp = sizes(estimate(model, small_run(mixed=True, gpus=4)))
    assert ddp["DDP buckets"] == ddp["update: gradients"] == 2 * trained


def test_autocast_keeps_copies_of_fp32_weights():
    model = meta("deepseek-community/Janus-Pro-1B")
    assert sizes(estimate(model, small_run(mixed=True)))["update: weights cast"] == 2 * 1_233_125_376
    assert sizes(estimate(model, small_run()))["update: weights cast"] == 0


def test_the_command_prints_a_column_a_recipe():
    text = memory_table(RECIPES, [], gpus=1, zero=0, prompt=32)
    assert "| GiB a device | janus1b_geneval | janus1b_hpsv2 | janus7b_geneval | janus7b_hpsv2 |" in text
    assert "the models of the rewards geneval, hpsv2, which declare" in text and "fp32 copy" not in text
    halves = memory_table(RECIPES[:1], ["--dtype", "bfloat16"], gpus=1, zero=0, prompt=32)
    assert "without an fp32 copy" in halves
    lora = memory_table(RECIPES[:1], ["--use_peft", "true"], gpus=4, zero=2, prompt=32)
    assert "4 devices, ZeRO-2" in lora and "Some adapters lie" not in lora
    vision = memory_table(RECIPES[:1], ["--use_peft", "true", "--lora_target_modules", "q_proj", "v_proj"], 1, 0, 32)
    assert "Some adapters lie where no gradient comes" in vision


def test_mistakes_say_what_to_write(tiny_text):
    with pytest.raises(ValueError, match="'nobody/nothing' has no configuration on this disk; give a local folder"):
        config_of("nobody/nothing")
    with pytest.raises(ValueError, match="model_name_or_path is missing"):
        config_of(None)
    with pytest.raises(ValueError, match="of type 'janus'; this is a 'llama' model"):
        meta(tiny_text)
    with pytest.raises(ValueError, match="quantised weights are not counted"):
        meta("shapes-janus", "--load_in_4bit", "true")
    with pytest.raises(ValueError, match="zero=1 is not counted; give 0"):
        small_run(zero=1)
    with pytest.raises(ValueError, match="rows=0 must be at least 1"):
        small_run(rows=0)
    found = estimate(meta("shapes-janus"), small_run(optimizer="adafactor", rewards={"mine": None, "yours": 7}))
    assert sizes(found)["optimizer"] is None and sizes(found)["reward mine"] is None
    assert sizes(found)["reward yours"] == 7


# measured


class Gradients(TrainerCallback):
    """Bytes of gradients at the optimizer step; afterwards they are gone."""

    bytes = 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.bytes = memory.size_of(p.grad for p in model.parameters() if p.grad is not None)


CASES = {
    "fp32": ({}, None),
    "bf16": ({"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}}, None),
    "autocast": ({"bf16": True}, None),
    "lora": ({}, LoraConfig(r=4, target_modules=".*language_model.*_proj", lora_dropout=0.0)),
    "lora bf16": (
        {"bf16": True, "model_init_kwargs": {"dtype": "bfloat16"}},
        LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.0),  # the vision tower's as well
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_real_step_holds_what_the_table_says(case, tmp_path):
    settings, peft_config = CASES[case]
    trainer, gradients = janus_trainer(str(CHECKPOINT), tmp_path, peft_config=peft_config, **settings), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    dtype = settings.get("model_init_kwargs", {}).get("dtype", "float32")
    words = ["--dtype", dtype, "--bf16", str(settings.get("bf16", False))]
    if peft_config is not None:
        names = peft_config.target_modules
        names = [names] if isinstance(names, str) else sorted(names)
        words += ["--use_peft", "true", "--lora_r", "4", "--lora_dropout", "0", "--lora_target_modules", *names]
    run = small_run(mixed=settings.get("bf16", False), reference=peft_config is None)
    found = sizes(estimate(meta("shapes-janus", *words), run))
    assert found["parameters, trained"] == memory.size_of(p for p in trainer.model.parameters() if p.requires_grad)
    assert found["parameters, frozen"] == memory.size_of(p for p in trainer.model.parameters() if not p.requires_grad)
    assert found["update: gradients"] == gradients.bytes > 0
    states = [t for state in trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    assert found["optimizer"] == memory.size_of(states) > 0
    reference = memory.size_of(trainer.ref_model.parameters()) if trainer.ref_model is not None else 0
    assert found["reference model"] == reference


@pytest.mark.parametrize("guided", [True, False])
def test_the_cache_is_what_the_decoder_allocates(policy, guided):
    prompts = policy.encode(PROMPTS)
    rows = torch.tensor([0, 0, 1, 1, 1])
    state, _ = policy.start(prompts, rows, guided)
    assert isinstance(state.decoder, LlamaDecoder)
    blocks = state.decoder.blocks
    held = sum(t.untyped_storage().nbytes() for block in blocks for t in (block.keys, block.values))
    run = small_run(sampled=5, guided=guided, prompt=prompts.ids.shape[1])
    assert (
        memory.cache(policy.model, run)
        == held
        == 2 * LAYERS * (10 if guided else 5) * 128 * HIDDEN * 4  # 16 to 30 words and 80 tokens, in windows of 64
    )


def test_graphs_keep_what_the_sampler_holds(policy):
    held = {row.name for row in estimate(policy.model, small_run(graphs=True)) if row.when == "always"}
    assert {"rollout: cache", "rollout: joined weights"} <= held
    assert not held & {row.name for row in estimate(policy.model, small_run()) if row.when == "rollout"} - {
        "rollout: cache",
        "rollout: joined weights",
    }


def test_joined_weights_are_what_the_sampler_copies(policy):
    state, _ = policy.start(policy.encode(PROMPTS), torch.tensor([0]), False)
    own = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    read = [tensor for block in state.decoder.blocks for maps in block.maps.values() for tensor in maps.tensors]
    copied = sum(tensor.nbytes for tensor in read if tensor.untyped_storage().data_ptr() not in own)
    # Queries, keys, values (3 x 32 x 32) and gate with up (2 x 32 x 96) of each of 2 layers, fp32.
    assert memory.joined(policy.model, small_run()) == copied == 2 * (3 * 32 * 32 + 2 * 32 * 96) * 4


def saved_bytes(model, ids, mask, autocast):
    """Bytes of the distinct storages that one teacher-forced forward saves for its backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = (storage.nbytes(), storage)  # kept alive, so that no address is used twice
        return tensor

    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), context:
        scores = teacher_forced(model, ids, mask, TOKENS, 1.0)
    assert scores.log_probs.requires_grad
    return sum(size for size, _ in storages.values())


@pytest.mark.parametrize("case", ["fp32", "bf16", "autocast", "lora", "checkpointed"])
def test_activations_are_within_5_percent_of_what_is_saved(tiny_janus, case):
    model, processor = load_janus(tiny_janus)
    policy = JanusPolicy(model, processor)
    freeze_all_but(model, policy, None)
    model.to(torch.bfloat16 if case == "bf16" else torch.float32).train()
    adapted = model
    if case == "lora":
        from peft import get_peft_model

        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=".*language_model.*_proj", lora_dropout=0.0))
        adapted.train()
    if case == "checkpointed":
        model.gradient_checkpointing_enable()
    prompts = policy.encode(PROMPTS * 2)
    tokens = torch.randint(model.config.vq_config.num_embeddings, (4, TOKENS))
    ids, mask = torch.cat([prompts.ids, tokens], 1), torch.cat([prompts.mask, torch.ones_like(tokens)], 1)
    run = small_run(prompt=prompts.ids.shape[1], mixed=case in ("bf16", "autocast"))
    seen = saved_bytes(model, ids, mask, autocast=case == "autocast")
    logits = 4 * TOKENS * model.config.vq_config.num_embeddings * LOGIT_SAVED
    expected = memory.activations(adapted, run, case == "checkpointed") + logits
    if case == "autocast":
        expected += sizes(estimate(adapted, run))["update: weights cast"]
    if case == "checkpointed":  # the one layer that is computed again is not there yet
        layer = memory.layer_of(model, memory.Shape.of(model.config), run)
        seq = ids.shape[1] - 1
        expected -= 4 * seq * kept_by_a_layer(layer, seq)
    assert expected == pytest.approx(seen, rel=0.05), f"{expected} on paper, {seen} saved, ratio {expected / seen:.3f}"
