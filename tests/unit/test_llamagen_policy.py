"""LlamaGen as a policy: what it draws is what it is scored on, caption by caption."""

import pytest
import torch
from tiny import GRID, TOKENS, Zero3
from torch.testing import assert_close
from transformers import DynamicCache, T5EncoderModel
from transformers.integrations import deepspeed

from gcpo_trl.models.llamagen.processing import LlamaGenProcessor, class_tokenizer
from gcpo_trl.models.llamagen.text import TextEncoder, load_t5
from gcpo_trl.policies import family_of, lora_targets
from gcpo_trl.policies.llamagen import LlamaGenPolicy, load
from gcpo_trl.rollout import Sampling, sample

SHORT, LONG = "a photo of a red circle", "a photo of two blue squares left of a heart"
END = 1  # T5's end of sequence, and an image code like any other


@pytest.fixture(scope="module")
def drawing(tiny_llamagen):
    """A policy that no test changes."""
    return load(tiny_llamagen)


def scored(policy, prompts, tokens, temperature=1.0):
    """Log-probabilities and entropies of tokens as the trainer asks for them, prompts left-padded by ids."""
    encoded = policy.encode(prompts)
    ids = torch.cat([encoded.ids, tokens], dim=1)
    mask = torch.cat([encoded.mask, torch.ones_like(tokens)], dim=1)
    with torch.no_grad():
        scores = policy.teacher_forced(policy.model, ids, mask, temperature)
    return scores.log_probs, scores.entropy


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_greedy_images_are_those_of_a_plain_loop(drawing, scale):
    model, body = drawing.model, drawing.model.model
    encoded = drawing.encode([SHORT, LONG])
    condition, mask = drawing.condition(encoded.ids, encoded.mask)
    codes = []
    with torch.no_grad():
        embeddings = torch.cat([body.condition(condition), body.condition.unconditional(2)])
        mask, cache = mask.repeat(2, 1), DynamicCache(config=model.config)
        for _ in range(TOKENS):
            out = body(inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache, use_cache=True)
            logits = model.lm_head(out.last_hidden_state[:, -1])
            codes.append((logits[2:] + scale * (logits[:2] - logits[2:])).argmax(-1))
            embeddings = body.embed_tokens(codes[-1])[:, None].repeat(2, 1, 1)
            mask = torch.cat([mask, mask.new_ones(4, 1)], dim=1)
    found = sample(drawing, [SHORT, LONG], 0, [0, 1], Sampling(guidance_scale=scale, temperature=0.0))
    assert torch.equal(found.tokens, torch.stack(codes, dim=1)) and len(found.tokens.unique()) > 4


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_what_is_harvested_is_what_is_scored(drawing, backend):
    sampling = Sampling(guidance_scale=2.0, temperature=0.9, entropy_from="conditional", backend=backend)
    prompts = [SHORT, LONG, SHORT]
    rollout = sample(drawing, prompts, 3, [0, 1, 2], sampling)
    logps, entropy = scored(drawing, prompts, rollout.tokens, temperature=0.9)
    assert_close(rollout.logps, logps, rtol=0, atol=1e-4)
    assert_close(rollout.entropy, entropy, rtol=0, atol=1e-4)
    assert not torch.equal(rollout.tokens[0], rollout.tokens[2])


def test_a_caption_gives_the_same_alone_and_beside_a_longer_one(drawing):
    sampling = Sampling(guidance_scale=2.0)
    both = sample(drawing, [SHORT, LONG], 5, [0, 1], sampling)
    for row, prompt in enumerate((SHORT, LONG)):
        alone = sample(drawing, [prompt], 5, [row], sampling)
        assert torch.equal(alone.tokens[0], both.tokens[row])
        together, single = scored(drawing, [SHORT, LONG], both.tokens), scored(drawing, [prompt], alone.tokens)
        assert_close(together[0][row], single[0][0], rtol=0, atol=1e-4)
    other = sample(drawing, [LONG, LONG], 5, [0, 1], sampling)
    assert not torch.equal(other.tokens[0], both.tokens[0])  # the caption matters


def test_the_code_that_ends_a_caption_ends_no_image(drawing):
    tokens = torch.randint(2, 60, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    ended = tokens.clone()
    ended[0, 10] = END
    before, after = scored(drawing, [SHORT], tokens)[0], scored(drawing, [SHORT], ended)[0]
    assert torch.equal(before[0, :10], after[0, :10]) and not torch.equal(before[0, 11:], after[0, 11:])
    assert after.shape == (1, TOKENS) and torch.isfinite(after).all()


def test_features_are_those_of_t5_behind_zeros(tiny_llamagen, drawing):
    encoded = drawing.encode([SHORT, LONG])
    features, mask = drawing.condition(encoded.ids, encoded.mask)
    t5 = T5EncoderModel.from_pretrained(f"{tiny_llamagen}/text_encoder").eval()
    words = len(SHORT.split()) + 1  # and the end of the caption
    with torch.no_grad():
        expected = t5(input_ids=encoded.ids[:1, -words:]).last_hidden_state
    assert mask[0].tolist() == [0] * (features.shape[1] - words) + [1] * words
    assert_close(features[:1, -words:], expected, rtol=0, atol=1e-6)
    assert not features[0, :-words].any()


def test_a_caption_is_encoded_once():
    calls = []

    class Counting(torch.nn.Module):
        device = torch.device("cpu")

        def forward(self, input_ids, attention_mask):
            calls.append(input_ids.tolist())
            return type("Out", (), {"last_hidden_state": input_ids[..., None].float()})

    encoder = TextEncoder("nowhere", tokens=4, load=lambda name, device: Counting())
    ids, mask = torch.tensor([[0, 7, 1], [8, 9, 1], [0, 7, 1]]), torch.tensor([[0, 1, 1], [1, 1, 1], [0, 1, 1]])
    features, shown = encoder(ids, mask)
    encoder(ids[:1], mask[:1])
    assert calls == [[[7, 1]], [[8, 9, 1]]]
    assert features[..., 0].tolist() == [[0, 0, 7, 1], [0, 8, 9, 1], [0, 0, 7, 1]]
    assert shown.tolist() == [[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]
    with pytest.raises(ValueError, match="a caption has 5 tokens; the prefix holds 1 to 4"):
        encoder(torch.ones(1, 5, dtype=torch.long), torch.ones(1, 5, dtype=torch.long))


def test_the_text_encoder_is_loaded_whole_in_a_zero3_run(tiny_llamagen, monkeypatch):
    # It stands beside the policy, where no engine would gather its parts.
    config, seen, original = Zero3(), [], T5EncoderModel.from_pretrained

    def loaded(*args, **settings):
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        return original(*args, **settings)

    monkeypatch.setattr(T5EncoderModel, "from_pretrained", loaded)
    deepspeed.set_hf_deepspeed_config(config)
    try:
        encoder = load_t5(f"{tiny_llamagen}/text_encoder", torch.device("cpu"))
        assert seen == [False] and deepspeed.is_deepspeed_zero3_enabled()
        assert encoder.shared.weight.numel() > 0 and not encoder.shared.weight.requires_grad
    finally:
        deepspeed.unset_hf_deepspeed_config()


def test_under_autocast_it_draws_in_the_precision_it_is_scored_in(drawing):
    # A prefix embedded in bf16 is added up with fp32 codes when it is scored, so both are fp32 there, and here.
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        encoded, rows = drawing.encode([SHORT, LONG]), torch.tensor([0, 1])
        assert drawing.model.model.condition(drawing.condition(encoded.ids, encoded.mask)[0]).dtype == torch.bfloat16
        state, _ = drawing.start(encoded, rows, guided=True)
        assert (state.dtype, state.table.dtype) == (torch.float32, torch.float32)
        assert state.decoder.step(state.table[torch.zeros(4, dtype=torch.long)]).dtype == torch.float32


def test_a_missing_text_encoder_says_where_to_get_it(tiny_llamagen):
    policy = load(tiny_llamagen)
    policy.text_encoder = TextEncoder("no/such-t5", tokens=16)
    with pytest.raises(FileNotFoundError, match="hf download google/flan-t5-xl"):
        sample(policy, [SHORT], 0, [0], Sampling())


def test_similarity_lives_in_the_inputs_or_in_the_normalised_codes(drawing):
    assert torch.equal(drawing.token_table("aligner"), drawing.model.model.embed_tokens.weight)
    codes = drawing.token_table("codebook")
    assert_close(codes.norm(dim=1), torch.ones(len(codes)))
    assert drawing.layout.grids == ((GRID, GRID),) and family_of(drawing.model.config) == "llamagen"


def test_pictures_come_from_the_tokenizer(drawing):
    pictures = drawing.decode(torch.zeros(2, TOKENS, dtype=torch.long))
    assert [picture.size for picture in pictures] == [(36, 36)] * 2
    pixels = drawing.model.decode_image_tokens(torch.zeros(1, TOKENS, dtype=torch.long))[0, :, 4, 5]
    assert pictures[0].getpixel((5, 4)) == tuple(int(v) for v in ((pixels + 1) * 127.5).clamp(0, 255))


def test_lora_adapts_the_body_and_the_head_if_asked(drawing):
    import re

    names = [name for name, module in drawing.model.named_modules() if isinstance(module, torch.nn.Linear)]
    body = [name for name in names if re.fullmatch(lora_targets(drawing.model.config), name)]
    assert len(body) == 7 * 2 and not any("condition" in name or "lm_head" in name for name in body)
    assert [n for n in names if re.fullmatch(lora_targets(drawing.model.config, ["generation_head"]), n)] == ["lm_head"]
    with pytest.raises(ValueError, match="'vqmodel', which LoRA cannot adapt"):
        lora_targets(drawing.model.config, ["vqmodel"])


def test_classes_are_prompts_too(tiny_llamagen):
    from gcpo_trl.models import LlamaGenForImageGeneration

    config = LlamaGenForImageGeneration.from_pretrained(tiny_llamagen).config
    config.condition, config.condition_tokens, config.num_classes = "class", 1, 5
    torch.manual_seed(0)
    policy = LlamaGenPolicy(LlamaGenForImageGeneration(config).eval(), LlamaGenProcessor(class_tokenizer(5)))
    with torch.no_grad():
        policy.model.model.condition.embedding_table.weight.mul_(200)
        policy.model.lm_head.weight.mul_(20)
    rollout = sample(policy, ["3", "4"], 0, [0, 0], Sampling(guidance_scale=1.5, entropy_from="conditional"))
    assert not torch.equal(rollout.tokens[0], rollout.tokens[1])  # the same noise, another class
    logps, entropy = scored(policy, ["3", "4"], rollout.tokens)
    assert_close(rollout.logps, logps, rtol=0, atol=1e-4)
    assert_close(rollout.entropy, entropy, rtol=0, atol=1e-4)
