"""Every way of running a step draws the same images: transformers' forward, the fast path, and its fixed-shape form.

The fixed-shape step is what a CUDA graph records. Here it runs as the plain function it is, which covers all of that
path but the recording itself.
"""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tiny import PROMPTS, TOKENS, build_janus, load_janus
from torch.testing import assert_close
from transformers import LlamaConfig, LlamaModel

from gcpo_trl.policies import lora_targets
from gcpo_trl.policies.decoding import llama_decoder
from gcpo_trl.policies.decoding.llama_block import LinearMaps, is_plain
from gcpo_trl.policies.decoding.llama_decoder import GrowingDecoder, LlamaDecoder
from gcpo_trl.policies.janus import JanusPolicy
from gcpo_trl.rollout import Sampling, engine, graph, sample
from gcpo_trl.shapes.build import build_processor

SAME = [PROMPTS[0]] * 3  # no prompt is padded
PADDED = [PROMPTS[0], PROMPTS[1], PROMPTS[0]]


@pytest.fixture
def recorded(monkeypatch):
    """Let the CPU take the path of graphs, with the step itself for a graph; one entry a recording."""
    windows = []

    def record(step, counters):
        before = [counter.clone() for counter in counters]
        step()  # a recording warms up, so running a step before its time must do no harm
        for counter, value in zip(counters, before, strict=True):
            counter.copy_(value)
        windows.append(step)
        return step

    monkeypatch.setattr(graph, "capturable", lambda device: True)
    monkeypatch.setattr(graph, "record", record)
    return windows


def double(seed=0, adapters=False):
    """The tiny Janus in fp64, with adapters that do something if asked."""
    model = build_janus(seed)
    if adapters:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=lora_targets(model.config)), model)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return JanusPolicy(model.double().eval(), build_processor())


def draw(policy, prompts, backend, **settings):
    settings = {"guidance_scale": 3.0} | settings
    return sample(policy, prompts, 0, list(range(len(prompts))), Sampling(backend=backend, **settings))


def assert_same(one, other, atol=1e-6):
    assert torch.equal(one.tokens, other.tokens)
    assert_close(one.entropy, other.entropy, rtol=0, atol=atol)
    assert_close(one.logps, other.logps, rtol=0, atol=atol)


@pytest.mark.parametrize("adapters", [False, True], ids=["plain", "lora"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("prompts", [SAME, PADDED], ids=["equal", "padded"])
def test_all_backends_draw_the_same_tokens(recorded, prompts, guidance, adapters):
    policy = double(adapters=adapters)
    settings = {"guidance_scale": guidance, "temperature": 0.9}
    reference = draw(policy, prompts, "reference", **settings)
    assert len({tuple(row) for row in reference.tokens.tolist()}) == 3 and reference.entropy.std() > 0.1
    assert_same(draw(policy, prompts, "eager", **settings), reference)
    assert_same(draw(policy, prompts, "eager", batch_size=2, **settings), reference)
    assert recorded == []
    assert_same(draw(policy, prompts, "graph", **settings), reference)
    assert_same(draw(policy, prompts, "graph", batch_size=2, **settings), reference)
    assert recorded


def test_fp32_agrees_with_the_reference(shared_policy):
    fast, plain = (draw(shared_policy, PADDED, backend) for backend in ("eager", "reference"))
    assert_same(fast, plain, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"top_k": 5}, {"top_p": 0.7}, {"temperature": 0}, {"entropy_from": "conditional"}]
)
def test_all_settings_hold_in_the_fixed_step(recorded, settings):
    policy = double()
    assert_same(draw(policy, PADDED, "graph", **settings), draw(policy, PADDED, "reference", **settings))


def test_one_recording_serves_a_window_and_the_next_rollout(recorded):
    # 13 or more tokens of prompt and 81 of image: the windows end at 64 and 128.
    policy = double()
    first = draw(policy, SAME, "auto")
    assert len(recorded) == 2
    second = draw(policy, list(reversed(SAME)), "auto")
    assert len(recorded) == 2
    assert_same(first, second)


def test_weights_written_in_place_are_seen_and_moved_weights_are_recorded_again(recorded):
    policy = double()
    draw(policy, PADDED, "graph")
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "layers" in name or "generation" in name:
                parameter.mul_(1.1)  # as an optimizer does
    after = draw(policy, PADDED, "graph")
    assert len(recorded) == 2
    assert_same(after, draw(policy, PADDED, "reference"))
    layer = policy.model.model.language_model.layers[1]
    layer.mlp.down_proj.weight.data = layer.mlp.down_proj.weight.data * 1.3  # as gathering a sharded weight does
    moved = draw(policy, PADDED, "graph")
    assert len(recorded) == 4
    assert_same(moved, draw(policy, PADDED, "reference"))
    assert not torch.equal(moved.tokens, after.tokens)


def test_an_image_alone_in_its_chunk_is_not_written_over_by_the_next(recorded):
    policy = double()
    assert_same(draw(policy, SAME, "graph", batch_size=1), draw(policy, SAME, "eager"))


def test_two_shapes_are_kept_and_a_broken_rollout_is_not(recorded):
    policy = double()
    for count in (1, 2, 3):
        draw(policy, SAME[:count], "graph")
    assert [key[0][0] for key in engine._loops[policy]] == [2, 3]
    weight = policy.model.model.language_model.norm.weight
    weight.data[0] = torch.nan
    with pytest.raises(FloatingPointError, match="image token 0 of 81"):
        draw(policy, SAME, "graph")
    weight.data[0] = 1.0
    assert_same(draw(policy, SAME, "graph"), draw(policy, SAME, "reference"))


def test_auto_goes_on_without_graphs_and_graph_says_so(recorded, monkeypatch, caplog):
    def refuse(step, counters):
        raise graph.CaptureError("no luck")

    monkeypatch.setattr(graph, "record", refuse)
    policy = double()
    assert_same(draw(policy, PADDED, "auto"), draw(policy, PADDED, "eager"))
    assert "no luck; sampling without graphs" in caplog.text
    with pytest.raises(ValueError, match="rollout_backend='graph', but no luck; use 'eager'"):
        draw(policy, PADDED, "graph")


def test_a_cpu_has_no_graphs(shared_policy):
    with pytest.raises(ValueError, match="rollout_backend='graph' needs a CUDA device and the model is on cpu; use"):
        draw(shared_policy, SAME, "graph")
    with pytest.raises(ValueError, match="rollout_backend='fast' is unknown; use one of auto, graph, eager, reference"):
        draw(shared_policy, SAME, "fast")


def test_autocast_draws_alike(shared_policy, recorded):
    # bf16 products of fp32 weights; sums in another order may flip a rare token, and then the rest of that image.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain, eager, fixed = (draw(shared_policy, PADDED, one) for one in ("reference", "eager", "graph"))
    assert torch.equal(eager.tokens[:, :4], plain.tokens[:, :4])
    assert torch.equal(eager.tokens, fixed.tokens)
    assert 0 < (eager.logps[:, :4] - plain.logps[:, :4]).abs().max() < 0.1


# the decoder


def body(heads=4, shared=2):
    """A random Llama body in fp64 whose heads share keys."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=shared,
        initializer_range=0.3,
    )
    return LlamaModel(config).double().eval()


@torch.no_grad()
def states(decoder, steps=70, window=False):
    """Hidden states of a padded and a whole prompt, each continued twice, by the same random embeddings."""
    generator = torch.Generator().manual_seed(0)
    prompt = torch.randn(2, 5, 24, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    found = [decoder.fill(prompt, mask, torch.tensor([0, 1, 1, 0]), steps)]
    for step in range(steps):
        if window:
            decoder.fix(decoder.window_at(step + 1))
        found.append(decoder.step(torch.randn(4, 24, generator=generator, dtype=torch.float64)))
    return torch.stack(found)


@pytest.mark.parametrize("window", [False, True], ids=["growing", "fixed"])
@pytest.mark.parametrize("shared", [1, 2, 4])
def test_a_step_is_transformers_forward(shared, window):
    model = body(shared=shared)
    # the norms are fp32 in both
    assert_close(states(LlamaDecoder(model), window=window), states(GrowingDecoder(model)), rtol=0, atol=2e-6)


def test_a_window_reads_no_further_than_it_must():
    decoder = LlamaDecoder(body())
    states(decoder, steps=3)
    assert [decoder.window_at(n) for n in (1, 56, 57, 120, 121)] == [64, 64, 128, 128, 192]  # 8 columns are there
    assert decoder.blocks[0].keys.shape[2] == llama_decoder.WINDOW


def test_linear_maps_side_by_side():
    maps = [torch.nn.Linear(6, out, bias=False) for out in (4, 2)]
    inputs, residual = torch.randn(3, 6), torch.randn(3, 4)
    joined = LinearMaps(maps, None)
    assert_close(joined.apply(inputs), torch.cat([one(inputs) for one in maps], dim=1), rtol=0, atol=1e-6)
    maps[0].weight.data.mul_(2)
    again = LinearMaps(maps, None, joined.tensors)
    assert again.tensors[0] is joined.tensors[0]
    assert_close(again.apply(inputs)[:, :4], maps[0](inputs), rtol=0, atol=1e-6)
    single = LinearMaps(maps[:1], None)
    assert single.tensors[0] is maps[0].weight  # no copy
    assert_close(single.onto(residual, inputs), residual + maps[0](inputs), rtol=0, atol=1e-6)
    maps[1].register_forward_hook(lambda module, args, output: output + 1)
    assert not is_plain(maps[1], torch.nn.Linear)
    assert_close(LinearMaps(maps, None).apply(inputs)[:, 4:], maps[1](inputs), rtol=0, atol=1e-6)


def test_the_policy_keeps_its_own_memory(tiny_janus):
    # A rollout may not change how a checkpoint is saved: no two parameters share a storage.
    policy = JanusPolicy(*load_janus(tiny_janus))
    draw(policy, PROMPTS, "eager")
    storages = [parameter.untyped_storage().data_ptr() for parameter in policy.model.parameters()]
    assert len(set(storages)) == len(storages) and draw(policy, PROMPTS, "eager").tokens.shape == (2, TOKENS)
