"""The LlamaGen port against the released formulas written out, and its conversions."""

import argparse

import llamagen_reference as released
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModel, DynamicCache

from gcpo_trl.cli import convert as command
from gcpo_trl.models import LlamaGenConfig, LlamaGenForImageGeneration, LlamaGenVQConfig, LlamaGenVQModel
from gcpo_trl.models.llamagen.convert import (
    LAYOUTS,
    Checkpoint,
    export_tokenizer,
    export_transformer,
    import_tokenizer,
    import_transformer,
    read_checkpoint,
    transformer_config,
    wrap,
)
from gcpo_trl.models.llamagen.modeling import GridRotaryEmbedding, prefix_mask

CLOSE = {"rtol": 0, "atol": 1e-5}
CODES = torch.tensor([[4, 9, 1, 33, 1, 7, 20, 2], [11, 1, 1, 8, 49, 0, 3, 5]])  # 1 is T5's end of sequence


def port_of(state):
    checkpoint = Checkpoint("weights.pt", "model", state)
    config = transformer_config(checkpoint, heads=released.HEADS, grid=released.GRID)
    return import_transformer(checkpoint, config)


def text_conditions():
    """Features of two captions, the first of them four positions long, and which positions are real."""
    features = torch.randn(2, released.PREFIX, released.CAPTION, generator=torch.Generator().manual_seed(1))
    real = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    return features * real[..., None], real


@pytest.fixture(scope="module")
def text():
    state = released.released_state()
    return state, port_of(state)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_text_logits_are_the_released_ones(text, attention):
    state, model = text
    model.set_attn_implementation(attention)
    features, real = text_conditions()
    with torch.no_grad():
        found = model(CODES, features, real).logits
    expected = [released.logits(state, features[row], CODES[row], real[row]) for row in range(2)]
    assert found.shape == (2, 9, released.VOCAB) and found.std() > 1
    assert_close(found, torch.stack(expected), **CLOSE)


def test_without_a_caption_the_stand_in_is_the_prefix(text):
    state, model = text
    _, real = text_conditions()
    prefix = model.model.condition.unconditional(2)
    embeddings = torch.cat([prefix, model.model.embed_tokens(CODES)], dim=1)
    mask = torch.cat([real, real.new_ones(2, CODES.shape[1])], dim=1)
    with torch.no_grad():
        found = model.lm_head(model.model(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state)
    nothing = state["cls_embedding.uncond_embedding"]
    for row in range(2):
        expected = released.logits(state, nothing, CODES[row], real[row])
        assert_close(found[row, released.PREFIX - 1 :], expected, **CLOSE)


def test_class_logits_are_the_released_ones():
    state = released.released_state("class")
    model = port_of(state)
    assert (model.config.condition, model.config.num_classes, model.config.condition_tokens) == ("class", 7, 1)
    with torch.no_grad():
        found = model(CODES, torch.tensor([3, 6])).logits
        nothing = model.model.condition.unconditional(2)[:, 0]
    expected = [released.logits(state, torch.tensor(label), CODES[row]) for row, label in enumerate((3, 6))]
    assert_close(found, torch.stack(expected), **CLOSE)
    assert torch.equal(nothing, state["cls_embedding.embedding_table.weight"][7].expand(2, -1))


def test_one_code_at_a_time_from_a_cache_is_the_whole(text):
    _, model = text
    features, real = text_conditions()
    cache, steps = DynamicCache(config=model.config), []
    with torch.no_grad():
        whole = model(CODES, features, real).logits
        steps.append(model(None, features, real, past_key_values=cache, use_cache=True).logits)
        for place in range(CODES.shape[1]):
            codes = CODES[:, place : place + 1]
            steps.append(model(codes, condition_mask=real, past_key_values=cache, use_cache=True).logits)
    assert_close(torch.cat(steps, dim=1), whole, **CLOSE)


def test_rotation_is_zero_before_the_image_and_starts_upright():
    # A grid of 4 behind 4 prefix positions, 8 channels: f = 1 and 10000^(-1/2) = 0.01.
    config = LlamaGenConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, grid_size=4, condition_tokens=4
    )
    cosine, sine = GridRotaryEmbedding(config).table("cpu")
    assert cosine.shape == (20, 8) and not cosine[:4].any() and not sine[:4].any()
    assert torch.equal(cosine[4], torch.ones(8)) and not sine[4].any()
    one = torch.tensor(1.0)
    assert_close(sine[5], torch.tensor([0, 0, one.sin(), torch.tensor(0.01).sin()]).repeat(2))
    # Position 4 + 4 * 2 + 3: row 2, column 3.
    expected = torch.tensor([2.0, 0.02, 3.0, 0.03]).cos().repeat(2)
    assert_close(cosine[4 + 11], expected)


def test_a_padded_position_sees_itself_and_nobody_sees_it():
    added = prefix_mask(torch.tensor([[0, 0, 1, 1]]), torch.zeros(1, 4, 1))
    seen = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert (added[0, 0] == 0).long().tolist() == seen
    assert (prefix_mask(torch.tensor([[0, 1, 1, 1]]), torch.zeros(1, 1, 1))[0, 0] == 0).tolist() == [
        [False, *[True] * 3]
    ]


def test_every_parameter_of_a_text_model_trains_and_the_stand_in_does_not(text):
    _, model = text
    features, real = text_conditions()
    model.zero_grad()
    model(CODES[:, :-1], features, real, labels=CODES).loss.backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []
    assert "model.condition.uncond_embedding" in dict(model.named_buffers())
    model.zero_grad()


def test_dropout_is_off_unless_asked_for():
    config = LlamaGenConfig(
        hidden_size=8, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8, grid_size=2, vocab_size=9,
        condition="class", num_classes=3,
    )  # fmt: skip
    label, codes = torch.tensor([1]), torch.tensor([[1, 2]])
    still = LlamaGenForImageGeneration(config).train()
    assert torch.equal(still(codes, label).logits, still(codes, label).logits)
    config.resid_dropout = 0.5
    dropping = LlamaGenForImageGeneration(config).train()
    assert not torch.equal(dropping(codes, label).logits, dropping(codes, label).logits)


# conversion


@pytest.mark.parametrize("condition", ["text", "class"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_there_and_back_is_the_same_file(tmp_path, layout, condition):
    model = port_of(released.released_state(condition))
    contents = export_transformer(model, layout)
    if layout not in ("bare", "community"):
        contents |= {"optimizer": {"state": {}}, "steps": 7, "args": argparse.Namespace(lr=1e-4)}
    torch.save(contents, tmp_path / "in.pt")
    first = read_checkpoint(tmp_path / "in.pt")
    assert first.layout == layout
    model = import_transformer(first, transformer_config(first, heads=released.HEADS, grid=released.GRID))
    model.save_pretrained(tmp_path / "folder")
    again = AutoModel.from_pretrained(tmp_path / "folder")
    assert isinstance(again, LlamaGenForImageGeneration)
    torch.save(export_transformer(again, layout), tmp_path / "out.pt")
    second = read_checkpoint(tmp_path / "out.pt")
    assert list(second.state) == list(first.state) or second.state.keys() == first.state.keys()
    assert all(torch.equal(second.state[name], value) for name, value in first.state.items())


def test_released_weights_come_back_as_they_were():
    state = released.released_state()
    back = export_transformer(port_of(state), "model")["model"]
    assert back.keys() == state.keys() and all(torch.equal(back[name], value) for name, value in state.items())


def test_a_published_size_needs_no_heads():
    config = LlamaGenConfig.of_size("3B")
    assert (config.num_hidden_layers, config.hidden_size, config.head_dim, config.num_image_tokens) == (
        24,
        3200,
        100,
        256,
    )
    assert LlamaGenConfig.of_size("XL", grid_size=32).max_position_embeddings == 120 + 1024
    with pytest.raises(ValueError, match="no LlamaGen of size 'S'; there are B, L, XL"):
        LlamaGenConfig.of_size("S")
    with pytest.raises(ValueError, match="2 layers of width 24, which is no published size"):
        transformer_config(Checkpoint("x.pt", "model", released.released_state()))


def test_what_is_no_llamagen_is_refused_with_what_it_holds(tmp_path):
    state = released.released_state()
    path = tmp_path / "x.pt"
    torch.save({"model": state}, path)
    whole = path.read_bytes()
    cases = {
        "cut": (
            whole[: len(whole) // 2],
            r"x.pt is corrupt, cut short or holds more than tensors .* known are LlamaGen",
        ),
        "noise": (b"not a checkpoint", r"x.pt is corrupt"),
    }
    for contents, message in cases.values():
        path.write_bytes(contents)
        with pytest.raises(ValueError, match=message):
            read_checkpoint(path)
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"x.pt holds conv.weight, which is no LlamaGen; known are"):
        read_checkpoint(path)
    torch.save({"model": {"epochs": 3}}, path)
    with pytest.raises(ValueError, match="holds epochs and no tensors under them"):
        read_checkpoint(path)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="holds a list, no state dict"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt is not there"):
        read_checkpoint(tmp_path / "nowhere.pt")


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"model": Evil()}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_checkpoint(tmp_path / "x.pt")


def test_missing_and_unexpected_names_are_listed():
    state = released.released_state()
    config = transformer_config(Checkpoint("x.pt", "model", state), heads=released.HEADS, grid=released.GRID)
    del state["layers.1.ffn_norm.weight"]
    state["adapter.weight"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"missing \['layers.1.ffn_norm.weight'\]; unexpected \['adapter.weight'\]"):
        import_transformer(Checkpoint("x.pt", "model", state), config)
    del state["adapter.weight"]
    state["layers.1.ffn_norm.weight"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"layers.1.post_attention_layernorm.weight \(3,\), not \(24,\)"):
        import_transformer(Checkpoint("x.pt", "model", state), config)


# the image tokenizer


def small_tokenizer():
    torch.manual_seed(0)
    config = LlamaGenVQConfig(
        base_channels=32, channel_multiplier=[1, 2], num_res_blocks=1, latent_channels=32, embed_dim=3,
        num_embeddings=16, num_patches=4,
    )  # fmt: skip
    return LlamaGenVQModel(config).eval()


def test_codes_are_the_nearest_by_angle():
    model = small_tokenizer()
    model.quantize.embedding.weight.data[:3] = torch.tensor([[5.0, 0, 0], [0, 0.1, 0], [0, 0, 2.0]])
    model.quantize.embedding.weight.data[3:] = -1.0
    # Longest along y, so the code along y is chosen, short as it is; Euclid alone would take another.
    latent = torch.tensor([1.0, 3.0, 0.5]).view(1, 3, 1, 1)
    quantized, _, ids = model.quantize(latent)
    assert ids.tolist() == [1]
    assert_close(quantized.flatten(), torch.tensor([0.0, 1.0, 0.0]))


def test_the_tokenizer_goes_there_and_back():
    model = small_tokenizer()
    state = export_tokenizer(model, "model")["model"]
    assert {"encoder.conv_blocks.0.res.0.conv1.weight", "decoder.mid.1.q.weight", "quantize.codebook_used"} <= set(
        state
    )
    again = import_tokenizer(Checkpoint("vq.pt", "model", state), grid=4)
    assert again.config.channel_multiplier == [1, 2] and again.config.num_res_blocks == 1
    pixels = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        ids = model.encode(pixels).image_tokens
        assert torch.equal(again.encode(pixels).image_tokens, ids) and len(ids.unique()) > 1
        assert torch.equal(again.decode(ids.view(2, -1)), model.decode(ids.view(2, -1)))
    del state["quantize.codebook_used"]
    import_tokenizer(Checkpoint("vq.pt", "model", state), grid=4)
    with pytest.raises(ValueError, match="no image tokenizer"):
        import_tokenizer(Checkpoint("x.pt", "model", released.released_state()))


# the command


def converted(tmp_path, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.prepare(parser.parse_args(["llamagen", *map(str, words)]))()


def test_the_command_converts_whole_models_and_back(tmp_path, capsys):
    torch.save(wrap(released.released_state("class"), "module"), tmp_path / "gpt.pt")
    vq = small_tokenizer()
    vq.quantize.embedding = torch.nn.Embedding(released.VOCAB, 3)
    torch.save(export_tokenizer(vq, "model"), tmp_path / "vq.pt")
    sizes = ["--heads", released.HEADS, "--grid", released.GRID]
    converted(tmp_path, tmp_path / "gpt.pt", tmp_path / "model", "--vq", tmp_path / "vq.pt", *sizes)
    assert "(layout module): 18 tensors" in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "model").eval()
    pixels = model.decode_image_tokens(torch.zeros(1, 9, dtype=torch.long))
    assert pixels.shape == (1, 3, 6, 6)
    for part, source in (("vq", "vq.pt"), ("transformer", "gpt.pt")):
        converted(
            tmp_path, tmp_path / "model", tmp_path / f"back-{part}.pt", "--back", "--part", part, "--layout", "bare"
        )
        back, first = read_checkpoint(tmp_path / f"back-{part}.pt").state, read_checkpoint(tmp_path / source).state
        assert back.keys() == first.keys() and all(torch.equal(back[name], first[name]) for name in first)
    with pytest.raises(FileExistsError, match="exists already"):
        converted(tmp_path, tmp_path / "gpt.pt", tmp_path / "model")


def test_a_tokenizer_of_another_vocabulary_is_refused(tmp_path):
    torch.save(wrap(released.released_state("class"), "model"), tmp_path / "gpt.pt")
    torch.save(export_tokenizer(small_tokenizer(), "model"), tmp_path / "vq.pt")
    with pytest.raises(ValueError, match=r"vq.pt has 16 codes, .*gpt.pt draws 50"):
        converted(tmp_path, tmp_path / "gpt.pt", tmp_path / "m", "--vq", tmp_path / "vq.pt", "--heads", 3, "--grid", 3)
    assert not (tmp_path / "m").exists()


def test_a_model_without_tokenizer_says_how_to_get_one(text):
    with pytest.raises(ValueError, match=r"convert it again with --vq VQ\.pt"):
        text[1].decode_image_tokens(CODES)
