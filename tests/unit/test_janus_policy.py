"""The Janus adapter against transformers' own code: prompts, sampling, scoring, decoding."""

import numpy as np
import pytest
import torch
from tiny import GRID, HIDDEN, PROMPTS, TOKENS, build_janus, load_janus
from torch.testing import assert_close

from gcpo_trl.policies.janus import JanusPolicy
from gcpo_trl.rollout import Sampling, sample
from gcpo_trl.shapes import build

BOS, PAD, START = build.BOS, build.PAD, build.IMAGE_START
LONGER = "a photo of a black ring and a white bar"


def words_of(policy, ids):
    return policy.processor.tokenizer.convert_ids_to_tokens(ids)


def draw(policy, prompts, **settings):
    return sample(policy, prompts, 0, list(range(len(prompts))), Sampling(**settings))


def plain_logits(policy, ids, mask, tokens):
    """Logits of every image token in fp32, from one forward pass over the whole sequence, position ids by hand."""
    inner = policy.model.model
    codes = inner.generation_aligner(inner.generation_embeddings(tokens))
    embeddings = torch.cat([inner.language_model.embed_tokens(ids), codes], dim=1)
    mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    position_ids = torch.stack([torch.cumsum(row, 0) - 1 for row in mask]).clamp(min=0)
    hidden = inner.language_model(inputs_embeds=embeddings, attention_mask=mask, position_ids=position_ids)
    return inner.generation_head(hidden.last_hidden_state[:, ids.shape[1] - 1 : -1]).detach()


def score(policy, prompts, tokens, temperature=1.0):
    """``(log_probs, entropy)`` of image tokens, as the trainer asks for them."""
    policy.attach_head(policy.model, temperature)
    encoded = policy.encode(prompts)
    ids, mask = torch.cat([encoded.ids, tokens], 1), torch.cat([encoded.mask, torch.ones_like(tokens)], 1)
    scores = policy.model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True)
    return scores.log_probs, scores.entropy


# encode


def test_the_prompt_is_the_conversation_that_janus_was_trained_on(shared_policy):
    encoded = shared_policy.encode(["a photo of a circle"])
    user, assistant = build.USER, build.ASSISTANT
    expected = [BOS, user, ":", "a", "photo", "of", "a", "circle", assistant, ":", START]
    assert words_of(shared_policy, encoded.ids[0]) == expected


def test_the_unconditional_prompt_keeps_only_its_first_and_last_token(shared_policy):
    encoded = shared_policy.encode(["a photo of a circle"])
    assert words_of(shared_policy, encoded.unconditional_ids[0]) == [BOS, *[PAD] * 9, START]


def test_prompts_are_padded_on_the_left_and_blanked_behind_their_own_start(shared_policy):
    # 11 and 14 tokens: three of padding before the shorter one, hidden by its mask in both prompts.
    encoded = shared_policy.encode(["a photo of a circle", "a photo of a circle and a ring"])
    assert encoded.mask.tolist() == [[0] * 3 + [1] * 11, [1] * 14]
    assert words_of(shared_policy, encoded.ids[0])[:4] == [PAD, PAD, PAD, BOS]
    assert words_of(shared_policy, encoded.unconditional_ids[0]) == [*[PAD] * 3, BOS, *[PAD] * 9, START]
    assert words_of(shared_policy, encoded.row_ids(0))[0] == BOS and len(encoded.row_ids(0)) == 11


def test_a_conversation_and_its_text_are_the_same_prompt(shared_policy):
    message = {"role": "user", "content": PROMPTS[0]}
    parts = {"role": "user", "content": [{"type": "text", "text": PROMPTS[0]}]}
    expected = shared_policy.encode([PROMPTS[0]]).ids
    assert torch.equal(shared_policy.encode([[message]]).ids, expected)
    assert torch.equal(shared_policy.encode([[parts]]).ids, expected)


def test_ids_come_from_the_processor(shared_policy, monkeypatch):
    # The same model and words under other ids, special tokens included, draw the same images.
    words = build.vocabulary()
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(1)).tolist()
    monkeypatch.setattr(build, "vocabulary", lambda: [words[i] for i in order])
    model = build_janus()
    model.load_state_dict(shared_policy.model.state_dict())
    embeddings = model.model.language_model.embed_tokens.weight
    embeddings.data = embeddings.data[order]
    other = JanusPolicy(model, build.build_processor())
    assert other.bos_id == order.index(words.index(BOS)) != shared_policy.bos_id
    assert other.pad_id != shared_policy.pad_id and other.image_start_id != shared_policy.image_start_id
    expected, drawn = (draw(p, PROMPTS, guidance_scale=3.0) for p in (shared_policy, other))
    assert torch.equal(drawn.tokens, expected.tokens)
    assert_close(drawn.logps, expected.logps, rtol=0, atol=1e-5)


def test_a_grid_that_does_not_fit_is_refused(policy):
    policy.model.config.vision_config.num_image_tokens = 80
    with pytest.raises(ValueError, match=r"draws 80 image tokens .* 9x9 grid; set vision_config.num_image_tokens"):
        JanusPolicy(policy.model, policy.processor)


# sampling


@pytest.mark.parametrize("prompts", [[PROMPTS[0]], [PROMPTS[0], "a photo of a blue square"], PROMPTS], ids=len)
def test_greedy_sampling_is_that_of_transformers(policy, prompts):
    texts = [policy._template(prompt) for prompt in prompts]
    inputs = policy.processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    # transformers loses this setting when a checkpoint is loaded
    policy.model.generation_config.generation_kwargs = {"boi_token_id": policy.image_start_id}
    expected = policy.model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=3.0)
    drawn = draw(policy, prompts, guidance_scale=3.0, temperature=0)
    assert torch.equal(drawn.tokens, expected)
    assert min(len(set(row)) for row in expected.tolist()) > 5  # not one token all over


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_prompt_gives_alone_what_it_gives_beside_a_longer_one(shared_policy, guidance):
    alone = sample(shared_policy, [PROMPTS[0]], 0, [0], Sampling(guidance_scale=guidance))
    beside = draw(shared_policy, [PROMPTS[0], PROMPTS[1]], guidance_scale=guidance)
    assert torch.equal(alone.tokens, beside.tokens[:1])
    assert_close(alone.logps, beside.logps[:1], rtol=0, atol=1e-5)
    assert_close(alone.entropy, beside.entropy[:1], rtol=0, atol=1e-5)


def test_the_same_seed_gives_the_same_images_at_batch_2_and_8(shared_policy):
    prompts = [*PROMPTS, LONGER, PROMPTS[0]] * 2
    whole = draw(shared_policy, prompts, guidance_scale=3.0, batch_size=8)
    parts = draw(shared_policy, prompts, guidance_scale=3.0, batch_size=2)
    assert torch.equal(whole.tokens, parts.tokens)
    assert_close(whole.logps, parts.logps, rtol=0, atol=1e-5)
    pictures, same = shared_policy.decode(whole.tokens), shared_policy.decode(parts.tokens)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, same, strict=True))
    assert len({tuple(row) for row in whole.tokens.tolist()}) == 8  # repeated prompts give different images


def test_a_sample_is_known_by_its_index_and_not_by_its_place(shared_policy):
    sampling = Sampling(guidance_scale=1.0)
    first = sample(shared_policy, PROMPTS * 2, 0, [4, 5, 6, 7], sampling).tokens
    later = sample(shared_policy, [PROMPTS[0], PROMPTS[1]], 0, [6, 7], sampling).tokens
    assert torch.equal(first[2:], later)


def test_a_model_in_training_draws_what_it_draws_in_evaluation(policy):
    expected = draw(policy, PROMPTS, guidance_scale=3.0).tokens
    policy.model.gradient_checkpointing_enable()
    policy.model.train()
    policy.model.model.language_model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: torch.dropout(output, 0.5, module.training)
    )
    assert torch.equal(draw(policy, PROMPTS, guidance_scale=3.0).tokens, expected)
    assert policy.model.training


def test_a_repeated_prompt_is_prefilled_once(policy):
    rows = []
    policy.model.model.language_model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: rows.append(len(output))
    )
    draw(policy, PROMPTS * 3, guidance_scale=3.0)
    # Two prompts, conditional and unconditional; then six images, both ways, at every step but the last.
    assert rows == [4] + [12] * (TOKENS - 1)


def test_prompts_and_indices_must_match(shared_policy):
    with pytest.raises(ValueError, match="2 prompts but 3 sample indices"):
        sample(shared_policy, PROMPTS, 0, [0, 1, 2], Sampling())


def test_top_k_1_is_greedy_and_temperature_changes_the_draw(shared_policy):
    greedy = draw(shared_policy, PROMPTS, guidance_scale=1.0, temperature=0).tokens
    assert torch.equal(draw(shared_policy, PROMPTS, guidance_scale=1.0, top_k=1).tokens, greedy)
    assert torch.equal(draw(shared_policy, PROMPTS, guidance_scale=1.0, top_p=1e-6).tokens, greedy)
    assert not torch.equal(draw(shared_policy, PROMPTS, guidance_scale=1.0).tokens, greedy)


@pytest.mark.parametrize(("guidance", "temperature"), [(1.0, 1.0), (5.0, 1.0), (5.0, 0.7)])
def test_harvested_log_probs_are_the_teacher_forced_ones(policy, guidance, temperature):
    drawn = draw(policy, PROMPTS, guidance_scale=guidance, temperature=temperature, top_k=40)
    log_probs, _ = score(policy, PROMPTS, drawn.tokens, temperature)
    assert_close(drawn.logps, log_probs, rtol=0, atol=1e-5)
    encoded = policy.encode(PROMPTS)
    logits = plain_logits(policy, encoded.ids, encoded.mask, drawn.tokens) / temperature
    expected = logits.log_softmax(-1).gather(-1, drawn.tokens[..., None])[..., 0]
    assert_close(log_probs, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_is_that_of_the_named_distribution(policy, temperature):
    prompts, scale = PROMPTS, 3.0
    guided = draw(policy, prompts, guidance_scale=scale, temperature=temperature, entropy_from="guided")
    conditional = draw(policy, prompts, guidance_scale=scale, temperature=temperature, entropy_from="conditional")
    assert torch.equal(guided.tokens, conditional.tokens)
    encoded = policy.encode(prompts)
    c = plain_logits(policy, encoded.ids, encoded.mask, guided.tokens)
    u = plain_logits(policy, encoded.unconditional_ids, encoded.mask, guided.tokens)
    for drawn, logits in ((guided, u + scale * (c - u)), (conditional, c)):
        p = (logits / temperature).double().softmax(-1)
        assert_close(drawn.entropy.double(), -torch.xlogy(p, p).sum(-1), rtol=0, atol=1e-4)
    assert (guided.entropy - conditional.entropy).abs().mean() > 0.05
    # What the trainer's scoring reports is the conditional one.
    assert_close(score(policy, prompts, guided.tokens, temperature)[1], conditional.entropy, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("part", "token"), [("language_model.embed_tokens", 0), ("generation_embeddings", 1)])
def test_nan_weights_stop_the_rollout_and_name_the_token(policy, part, token):
    # A NaN in the embedding of words is seen at the first image token, one in that of image tokens at the second.
    policy.model.model.get_submodule(part).weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match=f"non-finite logits at image token {token} of 81"):
        draw(policy, PROMPTS, guidance_scale=3.0)


def test_nan_in_the_unconditional_prompt_alone_stops_the_rollout(policy):
    # Only the padding's embedding is broken, which a prompt alone in its batch never reads, but its blank twin does.
    policy.model.model.language_model.embed_tokens.weight.data[policy.pad_id] = torch.nan
    with pytest.raises(FloatingPointError, match="non-finite logits at image token 0 of 81"):
        draw(policy, [PROMPTS[0]], guidance_scale=3.0)


# the image head


def test_the_text_head_would_give_other_numbers(tiny_janus):
    # Image ids below the size of the text vocabulary: through the text head nothing fails, and all is wrong.
    from trl.trainer.utils import add_fused_lm_head

    policy = JanusPolicy(*load_janus(tiny_janus))
    tokens = draw(policy, PROMPTS, guidance_scale=1.0).tokens % 50
    right, _ = score(policy, PROMPTS, tokens)
    text = JanusPolicy(*load_janus(tiny_janus))
    add_fused_lm_head(text.model, temperature=1.0)
    encoded = text.encode(PROMPTS)
    ids, mask = torch.cat([encoded.ids, tokens], 1), torch.cat([encoded.mask, torch.ones_like(tokens)], 1)
    wrong = text.model(input_ids=ids, attention_mask=mask, labels=ids, fused_lm_head=True).log_probs[:, -TOKENS:]
    assert wrong.isfinite().all()
    assert (wrong - right).abs().mean() > 0.5


def test_other_calls_of_the_model_are_its_own(policy):
    ids = policy.encode(PROMPTS[:1]).ids
    expected = policy.model(input_ids=ids).logits
    policy.attach_head(policy.model, 1.0)
    assert torch.equal(policy.model(input_ids=ids).logits, expected)


def test_scores_carry_gradient_to_what_trains(policy):
    tokens = draw(policy, PROMPTS, guidance_scale=1.0).tokens
    log_probs, _ = score(policy, PROMPTS, tokens)
    log_probs.sum().backward()
    inner = policy.model.model
    for module in (inner.language_model, inner.generation_head, inner.generation_aligner):
        assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())
    assert policy.model.lm_head.weight.grad is None


# decode, layout


def test_pictures_are_those_of_the_processor_cut_and_not_rounded(shared_policy):
    tokens = draw(shared_policy, PROMPTS, guidance_scale=3.0).tokens
    pixels = shared_policy.model.decode_image_tokens(tokens).detach().float()
    expected = shared_policy.processor.postprocess(
        list(pixels.permute(0, 3, 1, 2)), return_tensors="PIL.Image.Image", input_data_format="channels_first"
    )["pixel_values"]
    pictures = shared_policy.decode(tokens)
    assert [picture.size for picture in pictures] == [(36, 36)] * 2
    assert all(np.array_equal(a, b) for a, b in zip(pictures, expected, strict=True))
    levels = (pixels + 1) * 127.5
    assert np.array_equal(np.stack(pictures), levels.clamp(0, 255).floor().numpy())
    assert not np.array_equal(np.stack(pictures), levels.clamp(0, 255).round().numpy())


def test_many_pictures_are_decoded_in_parts(shared_policy):
    tokens = torch.randint(64, (19, TOKENS))
    whole = np.stack(shared_policy.decode(tokens)).astype(int)
    alone = np.stack([shared_policy.decode(row[None])[0] for row in tokens])
    # Sums in another order differ in their last bit, which rarely carries a level over a whole number.
    assert np.abs(whole - alone).max() <= 1 and (whole != alone).mean() < 1e-3


def test_tokens_mean_what_the_model_reads_or_the_codes(shared_policy):
    inner = shared_policy.model.model
    aligner = shared_policy.token_table("aligner")
    assert aligner.shape == (64, HIDDEN) and not aligner.requires_grad
    one = inner.generation_aligner(inner.generation_embeddings(torch.tensor([5])))[0]
    assert_close(aligner[5], one, rtol=0, atol=1e-6)
    assert torch.equal(shared_policy.token_table("codebook"), inner.vqmodel.quantize.embedding.weight)
    assert shared_policy.layout.grids == ((GRID, GRID),)
