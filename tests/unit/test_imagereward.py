"""ImageReward: a checkpoint in the released layout scores as its formula, written out here in plain torch."""

import math

import pytest
import torch
from tiny_clip import SIDE, pictures
from torch.nn.functional import conv2d, gelu, layer_norm
from torch.testing import assert_close
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

from reward_funcs import _clip, imagereward

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d"]
WIDE, NARROW, HEADS, LAYERS = 12, 8, 2, 2  # widths of the picture's and of the prompt's model
PATCHES = (SIDE // 8) ** 2
TINY = {
    "vision": {
        "hidden_size": WIDE,
        "intermediate_size": 4 * WIDE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "image_size": SIDE,
        "patch_size": 8,
        "layer_norm_eps": 1e-6,
    },
    "text": {
        "vocab_size": len(WORDS),
        "hidden_size": NARROW,
        "encoder_hidden_size": WIDE,
        "intermediate_size": 4 * NARROW,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 40,
        "layer_norm_eps": 1e-12,
        "is_decoder": True,
    },
}


def released_state():
    """Random weights under the names and in the shapes of ImageReward.pt."""
    shapes = {
        "visual_encoder.cls_token": (1, 1, WIDE),
        "visual_encoder.pos_embed": (1, PATCHES + 1, WIDE),
        "visual_encoder.patch_embed.proj": (WIDE, 3, 8, 8),
        "visual_encoder.norm": (WIDE,),
        "text_encoder.embeddings.word_embeddings.weight": (len(WORDS), NARROW),
        "text_encoder.embeddings.position_embeddings.weight": (40, NARROW),
        "text_encoder.embeddings.LayerNorm": (NARROW,),
        "vision_proj": (5, WIDE),
        "text_proj": (5, NARROW),
    }
    for i in range(LAYERS):
        vision, text = f"visual_encoder.blocks.{i}.", f"text_encoder.encoder.layer.{i}."
        shapes |= {vision + "norm1": (WIDE,), vision + "norm2": (WIDE,)}
        shapes |= {vision + "attn.qkv": (3 * WIDE, WIDE), vision + "attn.proj": (WIDE, WIDE)}
        shapes |= {vision + "mlp.fc1": (4 * WIDE, WIDE), vision + "mlp.fc2": (WIDE, 4 * WIDE)}
        for kind, width in (("attention", NARROW), ("crossattention", WIDE)):
            attention = f"{text}{kind}."
            shapes |= {attention + "self.query": (NARROW, NARROW), attention + "output.dense": (NARROW, NARROW)}
            shapes |= {attention + "self.key": (NARROW, width), attention + "self.value": (NARROW, width)}
            shapes |= {attention + "output.LayerNorm": (NARROW,)}
        shapes |= {text + "intermediate.dense": (4 * NARROW, NARROW), text + "output.dense": (NARROW, 4 * NARROW)}
        shapes |= {text + "output.LayerNorm": (NARROW,)}
    state = {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}
    for name, shape in shapes.items():
        if name.endswith(("weight", "cls_token", "pos_embed")):
            state[f"blip.{name}"] = torch.randn(shape)
        else:
            # Words reach the first token by self-attention alone, so that it counts.
            state[f"blip.{name}.weight"] = torch.randn(shape) * (3.0 if ".attention." in name else 0.7)
            state[f"blip.{name}.bias"] = torch.randn(shape[0]) * 0.7
    widths = [NARROW, 6, 5, 4, 3, 1]
    for name, wide, narrow in zip((0, 2, 4, 6, 7), widths[:-1], widths[1:], strict=True):
        state |= {
            f"mlp.layers.{name}.weight": torch.randn(narrow, wide),
            f"mlp.layers.{name}.bias": torch.randn(narrow),
        }
    return state


class Written:
    """ImageReward's formula on the released names: one picture, one prompt's ids without padding."""

    def __init__(self, state):
        self.state = state

    def linear(self, x, name):
        return x @ self.state[f"{name}.weight"].T + self.state[f"{name}.bias"]

    def norm(self, x, name, eps):
        return layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps)

    def attend(self, query, key, value):
        """softmax(q k / sqrt(d)) v in each head, for (tokens, width)."""
        query, key, value = (x.unflatten(1, (HEADS, -1)).transpose(0, 1) for x in (query, key, value))
        weights = (query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])).softmax(-1)
        return (weights @ value).transpose(0, 1).flatten(1)

    def picture(self, pixels):
        at = "blip.visual_encoder."
        patches = conv2d(
            pixels[None], self.state[f"{at}patch_embed.proj.weight"], self.state[f"{at}patch_embed.proj.bias"], stride=8
        )
        x = torch.cat([self.state[f"{at}cls_token"][0], patches[0].flatten(1).T]) + self.state[f"{at}pos_embed"][0]
        for i in range(LAYERS):
            block = f"{at}blocks.{i}."
            query, key, value = self.linear(self.norm(x, f"{block}norm1", 1e-6), f"{block}attn.qkv").chunk(3, dim=-1)
            x = x + self.linear(self.attend(query, key, value), f"{block}attn.proj")
            hidden = self.linear(self.norm(x, f"{block}norm2", 1e-6), f"{block}mlp.fc1")
            x = x + self.linear(gelu(hidden), f"{block}mlp.fc2")
        return self.norm(x, f"{at}norm", 1e-6)

    def attention(self, x, context, name):
        parts = (f"{name}.self.{part}" for part in ("query", "key", "value"))
        projected = (self.linear(y, part) for y, part in zip((x, context, context), parts, strict=True))
        return self.norm(
            self.linear(self.attend(*projected), f"{name}.output.dense") + x, f"{name}.output.LayerNorm", 1e-12
        )

    def reward(self, pixels, ids):
        at, patches = "blip.text_encoder.", self.picture(pixels)
        x = self.state[f"{at}embeddings.word_embeddings.weight"][ids]
        x = x + self.state[f"{at}embeddings.position_embeddings.weight"][: len(ids)]
        x = self.norm(x, f"{at}embeddings.LayerNorm", 1e-12)
        for i in range(LAYERS):
            layer = f"{at}encoder.layer.{i}."
            x = self.attention(x, x, f"{layer}attention")
            x = self.attention(x, patches, f"{layer}crossattention")
            hidden = self.linear(gelu(self.linear(x, f"{layer}intermediate.dense")), f"{layer}output.dense")
            x = self.norm(hidden + x, f"{layer}output.LayerNorm", 1e-12)
        rating = x[0]
        for name in (0, 2, 4, 6, 7):
            rating = self.linear(rating, f"mlp.layers.{name}")
        return (rating[0] - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture
def state():
    return released_state()


@pytest.fixture
def scorer(monkeypatch, tmp_path, state):
    """A scorer on files as users have them."""
    torch.save(state, tmp_path / "ImageReward.pt")
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(tmp_path / "bert")
    monkeypatch.setattr(imagereward.build, "__defaults__", (TINY,))
    return imagereward.Scorer(str(tmp_path), str(tmp_path / "bert"), device="cpu", batch_size=2)


def test_it_is_the_written_formula(scorer, state):
    images = pictures(3)
    rewards = imagereward.reward(["a b d", "c", "d"], [images[0], None, images[2]], scorer)
    written = Written(state)
    # [CLS] a b d [SEP] and [CLS] d [SEP]
    first = written.reward(_clip.pixel_values(images[0], SIDE), [2, 5, 6, 8, 3])
    third = written.reward(_clip.pixel_values(images[2], SIDE), [2, 8, 3])
    assert rewards[1] is None
    assert_close(torch.tensor([rewards[0], rewards[2]]), torch.stack([first, third]), rtol=1e-4, atol=1e-4)


def test_a_long_prompt_is_cut_at_35_tokens_with_its_end_token(scorer, state):
    image = pictures(1)[0]
    found = imagereward.reward(["a b c d " * 10], [image], scorer)
    ids = [2, *([5, 6, 7, 8] * 9)[:33], 3]
    expected = Written(state).reward(_clip.pixel_values(image, SIDE), ids)
    assert_close(torch.tensor(found[0]), expected, rtol=1e-4, atol=1e-4)


def test_another_prompt_or_picture_changes_the_score_and_batches_do_not(scorer):
    images = [*pictures(2), *pictures(1, (40, 30)), *pictures(2, (9, 20))]
    prompts = ["a c", "d", "a d", "c", "a a c d"]
    together = imagereward.reward(prompts, images, scorer)
    alone = [imagereward.reward([p], [i], scorer)[0] for p, i in zip(prompts, images, strict=True)]
    assert_close(torch.tensor(together), torch.tensor(alone), rtol=1e-4, atol=1e-4)
    for other in (
        imagereward.reward(prompts[1:] + prompts[:1], images, scorer),
        imagereward.reward(prompts, images[1:] + images[:1], scorer),
    ):
        assert all(abs(mine - theirs) > 1e-3 for mine, theirs in zip(together, other, strict=True))


def test_missing_and_foreign_weights_are_errors_that_name_them(state):
    lacking = {key: value for key, value in state.items() if "blocks.1.attn.qkv" not in key}
    with pytest.raises(ValueError, match=r"vision model: missing keys encoder\.layers\.1\.self_attn\.qkv\.bias, "):
        imagereward.build(lacking, TINY)
    with pytest.raises(ValueError, match=r"text model: missing keys none; unexpected keys pooler\.dense\.weight"):
        imagereward.build(state | {"blip.text_encoder.pooler.dense.weight": torch.zeros(1)}, TINY)
    with pytest.raises(ValueError, match=r"head: missing keys layers\.7\.bias; unexpected keys none"):
        imagereward.build({key: value for key, value in state.items() if key != "mlp.layers.7.bias"}, TINY)
    with pytest.raises(ValueError, match=r"checkpoint: missing keys none; unexpected keys blip\.itm_head\.weight;"):
        imagereward.build(state | {"blip.itm_head.weight": torch.zeros(1)}, TINY)


def test_missing_files_say_what_to_download(scorer, tmp_path):
    lost = imagereward.Scorer(str(tmp_path / "absent.pt"), scorer.tokenizer, device="cpu")
    with pytest.raises(
        FileNotFoundError, match=r"hf download THUDM/ImageReward ImageReward\.pt .*IMAGEREWARD_CHECKPOINT=DIR"
    ):
        imagereward.reward(["a"], pictures(1), lost)
    lost = imagereward.Scorer(scorer.checkpoint, str(tmp_path / "absent"), device="cpu")
    with pytest.raises(
        FileNotFoundError, match=r"hf download google-bert/bert-base-uncased .*IMAGEREWARD_TOKENIZER=DIR"
    ):
        imagereward.reward(["a"], pictures(1), lost)


def test_the_released_size():
    # Every weight counted by its term. Heads do not show in it: 64 wide in both (vit.py, med_config.json).
    with torch.device("meta"):
        vision = BlipVisionModel(BlipVisionConfig(**imagereward.LARGE["vision"]))
        text = BlipTextModel(BlipTextConfig(**imagereward.LARGE["text"]), add_pooling_layer=False)
    block = 12 * 1024**2 + 13 * 1024  # qkv, proj, two of the mlp: 3 + 1 + 4 + 4; biases 3 + 1 + 4 + 1, norms 4
    assert vision.num_parameters() == 24 * block + 1024 * (3 * 16 * 16 + 1) + 1024 * (1 + 197) + 2 * 1024
    self_attention, cross = 4 * 768**2 + 6 * 768, 2 * 768**2 + 2 * 768 * 1024 + 6 * 768
    mlp = 8 * 768**2 + 7 * 768
    assert text.num_parameters() == 12 * (self_attention + cross + mlp) + 768 * (30524 + 512 + 2)
    assert vision.encoder.layers[0].self_attn.head_dim == 64
    assert text.encoder.layer[0].attention.self.attention_head_size == 64
