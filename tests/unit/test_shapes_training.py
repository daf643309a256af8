"""How the tiny Janus is made: noisy captions, blanked prompts, the spherical codebook, and the losses."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import PROMPTS, TOKENS, load_janus
from torch.testing import assert_close

from gcpo_trl.evaluation.shapes import summarize
from gcpo_trl.policies.janus import JanusPolicy
from gcpo_trl.rollout import Sampling, sample
from gcpo_trl.shapes.build import CHECKPOINT, build_processor, save_atomically
from gcpo_trl.shapes.grammar import TASKS, Item, Spec, all_specs
from gcpo_trl.shapes.localize import encode_tiles
from gcpo_trl.shapes.renderer import draw
from gcpo_trl.shapes.train_policy import any_scenes, blank, caption_loss, corrupt, encode_captions, scenes
from gcpo_trl.shapes.train_tokenizer import encode, quantize, reconstruction_errors, spherical_kmeans, to_pixels
from reward_funcs.shapes import Judgement, detect, judge_image


def differences(one, other):
    """What differs between two specs: each item's fields, and the relation."""
    fields = ("shape", "color", "count")
    found = [f for a, b in zip(one.items, other.items, strict=True) for f in fields if getattr(a, f) != getattr(b, f)]
    return found + (["relation"] if one.relation != other.relation else [])


@pytest.mark.parametrize("tag", TASKS)
def test_a_careless_caption_is_wrong_in_exactly_one_thing(tag):
    generator, pool = random.Random(0), all_specs(tag)
    seen = set()
    for _ in range(200):
        spec = generator.choice(pool)
        drawn = corrupt(spec, generator)
        (difference,) = differences(spec, drawn)
        assert drawn.tag == tag
        seen.add(difference)
    expected = {
        "single_object": {"shape", "count"},
        "two_object": {"shape", "count"},
        "counting": {"shape", "color", "count"},
        "colors": {"shape", "color", "count"},
        "position": {"shape", "relation"},
        "color_attr": {"shape", "color"},
    }
    assert seen == expected[tag]


def test_a_corrupt_spec_can_be_drawn():
    generator = random.Random(1)
    for pool in map(all_specs, TASKS):
        for spec in generator.choices(pool, k=30):
            draw(corrupt(spec, generator), generator)


def test_scenes_show_their_captions_unless_noise_is_asked_for():
    captions, pictures = scenes(24, seed=0, noise=0.0)
    assert pictures.shape == (24, 36, 36, 3) and pictures.dtype == np.uint8
    by_prompt = {spec.prompt: spec for tag in TASKS for spec in all_specs(tag)}
    shown = zip(captions, pictures, strict=True)
    judged = [judge_image(Image.fromarray(picture), by_prompt[caption].metadata).exact for caption, picture in shown]
    assert sum(judged) >= 23
    noisy, _ = scenes(24, seed=0, noise=1.0)
    assert set(noisy) <= set(by_prompt)  # the captions stay those of training
    assert any_scenes(6, seed=0).shape == (6, 36, 36, 3)


def test_blanked_captions_are_the_policys_unconditional_prompts(tiny_janus):
    model, processor = load_janus(tiny_janus)
    policy = JanusPolicy(model, processor)
    ids, mask = encode_captions(processor, PROMPTS)
    encoded = policy.encode(PROMPTS)
    assert torch.equal(ids, encoded.ids) and torch.equal(mask, encoded.mask)
    keep = (policy.bos_id, policy.image_start_id)
    assert torch.equal(blank(ids, keep, policy.pad_id, torch.tensor([True, True])), encoded.unconditional_ids)
    half = blank(ids, keep, policy.pad_id, torch.tensor([False, True]))
    assert torch.equal(half[0], ids[0]) and torch.equal(half[1], encoded.unconditional_ids[1])


def test_the_pretraining_loss_is_minus_the_mean_log_prob_of_the_policy(tiny_janus):
    model, processor = load_janus(tiny_janus)
    policy = JanusPolicy(model, processor)
    ids, mask = encode_captions(processor, PROMPTS)
    tokens = torch.randint(64, (2, TOKENS))
    loss = caption_loss(model, ids, mask, tokens)
    policy.attach_head(model, 1.0)
    whole, seen = torch.cat([ids, tokens], 1), torch.cat([mask, torch.ones_like(tokens)], 1)
    scores = model(input_ids=whole, attention_mask=seen, labels=whole, fused_lm_head=True)
    assert_close(loss, -scores.log_probs.mean(), rtol=1e-4, atol=0)


# the image tokenizer


def test_quantize_finds_the_code_of_the_nearest_direction():
    # Length does not count: (3, 4) is at cosine 0.8 from (0, 1) and 0.6 from (5, 0).
    codebook = torch.tensor([[5.0, 0.0], [0.0, 1.0]], requires_grad=True)
    latent = torch.tensor([[3.0, 4.0], [1.0, 0.1]]).T.view(1, 2, 1, 2).requires_grad_()
    ids, code = quantize(codebook, latent)
    assert ids.tolist() == [[[1, 0]]]
    assert_close(code[0, :, 0], torch.tensor([[0.0, 1.0], [1.0, 0.0]]), rtol=0, atol=1e-6)
    code.sum().backward()
    assert latent.grad is None and codebook.grad is not None


def test_kmeans_finds_two_directions():
    angles = torch.tensor([0.0, 0.2, 1.6, 1.8])
    points = torch.stack([angles.cos(), angles.sin()], dim=-1)
    centres = spherical_kmeans(points, 2, torch.Generator().manual_seed(0))
    found = torch.atan2(centres[:, 1], centres[:, 0]).sort().values
    assert_close(found, torch.tensor([0.1, 1.7]), rtol=0, atol=1e-6)


def test_kmeans_leaves_no_code_empty():
    points = torch.nn.functional.normalize(torch.randn(64, 4), dim=-1)
    points[:40] = points[0]  # most points are one point, so some of 16 starting centres coincide
    centres = spherical_kmeans(points, 16, torch.Generator().manual_seed(0))
    assert_close(centres.norm(dim=-1), torch.ones(16), rtol=0, atol=1e-5)


def test_pixels_lie_between_minus_one_and_one():
    picture = np.array([[[[0, 51, 255]]]], dtype=np.uint8)
    # 51 / 127.5 - 1 = -0.6
    assert_close(to_pixels(picture).flatten(), torch.tensor([-1.0, -0.6, 1.0]), rtol=0, atol=1e-6)


def test_errors_weigh_shapes_five_times():
    # Four grey pixels of 0 and one shape's pixel of 1; everything off by 0.5: (4 + 5) / 5 x 0.25, and x 0.5.
    pixels = torch.zeros(1, 3, 1, 5)
    pixels[..., 2] = 1.0
    mse, l1 = reconstruction_errors(pixels + 0.5, pixels)
    assert_close(mse.item(), 9 / 5 * 0.25, rtol=0, atol=1e-6)
    assert_close(l1.item(), 9 / 5 * 0.5, rtol=0, atol=1e-6)


def test_encode_gives_a_row_of_ids_a_picture_whatever_the_batch(tiny_janus):
    vq = load_janus(tiny_janus)[0].model.vqmodel
    pictures = any_scenes(5, seed=0)
    ids = encode(vq, pictures)
    assert ids.shape == (5, TOKENS) and torch.equal(encode(vq, pictures, batch_size=2), ids)


def test_codes_of_a_slot_depend_on_that_slot_alone(tiny_janus):
    vq = load_janus(tiny_janus)[0].model.vqmodel
    pictures = any_scenes(2, seed=0)
    changed = pictures.copy()
    changed[:, 12:24, 24:] = 0  # slot (1, 2): token rows 3 to 5, columns 6 to 8
    before, after = (encode_tiles(vq, p).view(2, 9, 9) for p in (pictures, changed))
    differs = torch.zeros(9, 9, dtype=torch.bool)
    differs[3:6, 6:9] = True
    assert torch.equal(before[:, ~differs], after[:, ~differs])
    assert not torch.equal(before[:, differs], after[:, differs])
    assert encode_tiles(vq, pictures, batch_size=1).view(2, 9, 9).equal(before)


# saving and reporting


def test_a_folder_appears_complete_or_not_at_all(tiny_janus, tmp_path):
    model, processor = load_janus(tiny_janus)
    folder = tmp_path / "deep" / "checkpoint"
    save_atomically(folder, model, processor)
    save_atomically(folder, model, processor)  # over the one that is there
    assert [path.name for path in folder.parent.iterdir()] == ["checkpoint"]
    again, loaded = load_janus(str(folder))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    assert loaded.image_processor.image_mean == build_processor().image_processor.image_mean


@pytest.mark.skipif(not CHECKPOINT.is_dir(), reason="no shipped checkpoint; make shapes-model builds it")
def test_the_shipped_model_is_small_plain_and_draws_shapes():
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) < 10e6
    model, processor = load_janus(str(CHECKPOINT))
    made = build_processor()
    assert processor.tokenizer.get_vocab() == made.tokenizer.get_vocab()
    assert processor.chat_template == made.chat_template
    assert processor.image_processor.image_mean == made.image_processor.image_mean
    policy = JanusPolicy(model.float(), processor)
    rollout = sample(policy, PROMPTS[:1] * 8, 0, list(range(8)), Sampling(guidance_scale=3.0))
    found = [detect(picture) for picture in policy.decode(rollout.tokens)]
    assert sum(any(shape["class"] != "unknown" for shape in shapes) for shapes in found) >= 6


def test_scores_are_means_of_task_means_with_errors_over_prompts():
    def judged(value):
        return Judgement(inventory=value, exact=value, correct=1.0, extra=0)

    ring, bar = Spec("single_object", (Item("ring"),)), Spec("single_object", (Item("bar"),))
    pair = Spec("two_object", (Item("ring"), Item("bar")))
    specs = [ring, ring, bar, bar, pair, pair]
    report = summarize(specs, [judged(v) for v in (1, 0, 1, 1, 0, 0)], {})
    # prompts of single_object: 1/2 and 1, mean 3/4, standard error sqrt(1/8) / sqrt(2) = 1/4; two_object has one: 0
    assert report.tasks["single_object"]["exact"] == pytest.approx({"mean": 0.75, "error": 0.25})
    assert report.tasks["two_object"]["exact"] == {"mean": 0.0, "error": 0.0}
    assert report.overall["exact"] == pytest.approx({"mean": 0.375, "error": 0.125})
    assert report.images == 6
    assert "| single_object | 0.750 ± 0.250 | 1.000 ± 0.000 |" in report.table()
