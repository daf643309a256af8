"""HPSv2: open_clip weights give the same cosine in transformers' CLIPModel, and the picture reaches it as in hpsv2."""

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from reward_funcs import _open_clip, hpsv2
from reward_funcs._weights import read_tensors

# One-letter words, so that the tokenizer needs no merges.
WORDS = ["c</w>", "d</w>", "a</w>", "<|startoftext|>", "<|endoftext|>"]
TINY = {
    "projection_dim": 6,
    "text_config": {
        "vocab_size": len(WORDS),
        "hidden_size": 8,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 7,
        "hidden_act": "gelu",
        "bos_token_id": 3,
        "eos_token_id": 4,
    },
    "vision_config": {
        "hidden_size": 12,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 3,
        "image_size": 16,
        "patch_size": 8,
        "hidden_act": "gelu",
    },
}


# A plain CLIP whose state dict has open_clip's names and shapes.


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, hidden, mask=None):
        normed = self.ln_1(hidden)
        hidden = hidden + self.attn(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return hidden + self.mlp(self.ln_2(hidden))


class Blocks(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.resblocks = nn.ModuleList([Block(width, heads), Block(width, heads)])

    def forward(self, hidden, mask=None):
        for block in self.resblocks:
            hidden = block(hidden, mask)
        return hidden


class Visual(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 8, 8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(12))
        self.positional_embedding = nn.Parameter(torch.randn(5, 12))
        self.ln_pre, self.ln_post = nn.LayerNorm(12), nn.LayerNorm(12)
        self.transformer = Blocks(12, 3)
        self.proj = nn.Parameter(torch.randn(12, 6))

    def forward(self, pixels):
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, 12)
        hidden = torch.cat([first, patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer(self.ln_pre(hidden))[:, 0]) @ self.proj


class OpenClip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = Visual()
        self.transformer = Blocks(8, 2)
        self.token_embedding = nn.Embedding(len(WORDS), 8)
        self.positional_embedding = nn.Parameter(torch.randn(7, 8))
        self.ln_final = nn.LayerNorm(8)
        self.text_projection = nn.Parameter(torch.randn(8, 6))
        self.logit_scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("attn_mask", torch.full((7, 7), -torch.inf).triu(1))
        for parameter in self.parameters():  # biases and norms too, so that none may be swapped unseen
            nn.init.normal_(parameter, std=0.5)

    def encode_text(self, tokens):
        length = tokens.shape[1]
        hidden = self.token_embedding(tokens) + self.positional_embedding[:length]
        hidden = self.ln_final(self.transformer(hidden, self.attn_mask[:length, :length]))
        return hidden[torch.arange(len(tokens)), tokens.argmax(dim=-1)] @ self.text_projection


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return OpenClip().eval()


@pytest.fixture
def scorer(monkeypatch, tmp_path, plain):
    """A scorer on files as users have them: the version's checkpoint in a folder, the tokenizer in another."""
    torch.save({"state_dict": plain.state_dict()}, tmp_path / "HPS_v2.1_compressed.pt")
    tokenizer = CLIPTokenizer(vocab={word: index for index, word in enumerate(WORDS)}, merges=[])
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    monkeypatch.setattr(_open_clip.clip_model, "__defaults__", (TINY,))
    return hpsv2.Scorer(checkpoint=str(tmp_path), tokenizer=str(tmp_path / "tokenizer"), device="cpu", batch_size=2)


def pictures(count):
    torch.manual_seed(1)
    return [Image.fromarray(torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()) for _ in range(count)]


def test_every_weight_finds_its_place_and_none_is_left_over(plain):
    model = _open_clip.clip_model(plain.state_dict(), TINY)  # loads strictly
    renamed = _open_clip.rename(plain.state_dict())
    assert set(renamed) == set(model.state_dict())
    assert {key: value.shape for key, value in renamed.items()} == {k: v.shape for k, v in model.state_dict().items()}


def test_fused_attention_weights_are_split_in_order(plain):
    model = _open_clip.clip_model(plain.state_dict(), TINY)
    hidden = torch.randn(2, 5, 12)
    fused, split = plain.visual.transformer.resblocks[1].attn, model.vision_model.encoder.layers[1].self_attn
    with torch.no_grad():
        assert_close(split(hidden)[0], fused(hidden, hidden, hidden)[0], rtol=0, atol=1e-5)


def test_features_equal_the_plain_clip(plain):
    model = _open_clip.clip_model({key: value.half() for key, value in plain.state_dict().items()}, TINY)
    plain = plain.half().float()  # checkpoints are stored in half precision
    pixels = torch.randn(2, 3, 16, 16)
    tokens = torch.tensor([[3, 2, 0, 4, 0, 0, 0], [3, 1, 4, 0, 0, 0, 0]])
    with torch.no_grad():
        images, texts = model.get_image_features(pixels).pooler_output, model.get_text_features(tokens).pooler_output
        assert images.dtype == torch.float32
        assert_close(images, plain.visual(pixels), rtol=0, atol=1e-4)
        assert_close(texts, plain.encode_text(tokens), rtol=0, atol=1e-4)


def test_missing_and_foreign_weights_are_errors(plain):
    state = plain.state_dict()
    with pytest.raises(RuntimeError, match=r"text_model\.final_layer_norm\.weight"):
        _open_clip.clip_model({key: value for key, value in state.items() if key != "ln_final.weight"}, TINY)
    with pytest.raises(ValueError, match=r"'head\.weight' is not open_clip's CLIP layout"):
        _open_clip.rename(state | {"head.weight": torch.zeros(1)})


def test_reward_is_the_plain_cosine_of_picture_and_prompt(scorer, plain):
    images = pictures(3)
    rewards = hpsv2.reward(["a c", "d", "a d"], [images[0], None, images[2]], scorer)
    # open_clip pads with 0; the feature is taken at the end token, which no later token reaches.
    tokens = torch.tensor([[3, 2, 0, 4, 0, 0, 0], [3, 2, 1, 4, 0, 0, 0]])
    pixels = torch.stack([hpsv2.pixel_values(image, 16) for image in (images[0], images[2])])
    with torch.no_grad():
        expected = torch.cosine_similarity(plain.visual(pixels), plain.encode_text(tokens), dim=-1)
    assert rewards[1] is None
    assert_close(torch.tensor([rewards[0], rewards[2]]), expected, rtol=0, atol=1e-5)


def test_prompts_stay_with_their_pictures_across_batches(scorer):
    images, prompts = pictures(5), ["a c", "d", "a d", "c", "a a c d"]
    together = hpsv2.reward(prompts, images, scorer)
    alone = [hpsv2.reward([prompt], [image], scorer)[0] for prompt, image in zip(prompts, images, strict=True)]
    assert_close(torch.tensor(together), torch.tensor(alone), rtol=0, atol=1e-5)
    assert len({round(value, 4) for value in together}) == 5


def test_one_color_picture_is_normalised():
    # (1 - mean) / std in every pixel, whatever the size.
    pixels = hpsv2.pixel_values(Image.new("RGB", (40, 30), "white"), 16)
    white = torch.tensor([(1 - 0.48145466) / 0.26862954, (1 - 0.4578275) / 0.26130258, (1 - 0.40821073) / 0.27577711])
    assert_close(pixels, white[:, None, None].expand(3, 16, 16), rtol=0, atol=1e-5)


def test_the_middle_of_the_long_side_is_kept():
    # 16 x 8 with side 8: columns 4 to 11 stay; column 3 is red, 4 green, 11 blue, 12 red.
    picture = Image.new("RGB", (16, 8), "black")
    for x, name in ((3, "red"), (4, "lime"), (11, "blue"), (12, "red")):
        picture.paste(name, (x, 0, x + 1, 8))
    pixels = hpsv2.pixel_values(picture, 8)
    on = pixels > 0
    assert on[1, 0, 0]
    assert on[2, 0, 7]
    assert not on[0].any()


def test_checkpoint_is_found_by_version_and_read_without_pickled_code(tmp_path, plain):
    state = {key: value.contiguous() for key, value in plain.state_dict().items()}
    torch.save(state, tmp_path / "HPS_v2_compressed.pt")  # bare, without "state_dict"
    save_file(state, tmp_path / "mine.safetensors")
    torch.save({"state_dict": Scripted()}, tmp_path / "HPS_v2.1_compressed.pt")
    assert hpsv2.checkpoint_path(str(tmp_path), "2.0") == tmp_path / "HPS_v2_compressed.pt"
    for path in (hpsv2.checkpoint_path(str(tmp_path), "2.0"), tmp_path / "mine.safetensors"):
        read = read_tensors(path)
        assert all(torch.equal(read[key], value) for key, value in state.items())
    with pytest.raises(Exception, match="Weights only load failed"):
        read_tensors(hpsv2.checkpoint_path(str(tmp_path), "2.1"))


class Scripted:
    """Pickles as a call, as a malicious checkpoint does."""

    def __reduce__(self):
        return (exec, ("raise SystemExit",))


def test_missing_checkpoint_says_what_to_download(tmp_path):
    missing = hpsv2.Scorer(checkpoint=str(tmp_path / "absent.pt"), device="cpu")
    with pytest.raises(FileNotFoundError, match=r"hf download xswu/HPSv2 HPS_v2.1_compressed.pt.*HPSV2_CHECKPOINT=DIR"):
        hpsv2.reward(["a c"], pictures(1), missing)


def test_missing_tokenizer_says_what_to_download(scorer, tmp_path):
    missing = hpsv2.Scorer(checkpoint=scorer.checkpoint, tokenizer=str(tmp_path / "absent"), device="cpu")
    with pytest.raises(FileNotFoundError, match="HPSV2_TOKENIZER=DIR"):
        hpsv2.reward(["a c"], pictures(1), missing)


def test_environment_names_the_scorer(monkeypatch):
    monkeypatch.setenv("HPSV2_CHECKPOINT", "here.pt")
    monkeypatch.setenv("HPSV2_VERSION", "2.0")
    assert (hpsv2.Scorer().checkpoint, hpsv2.Scorer().version) == ("here.pt", "2.0")
    with pytest.raises(ValueError, match=r"version='3'; write one of 2.0, 2.1"):
        hpsv2.Scorer(version="3")


def test_vit_h_14_has_the_published_size():
    # open_clip's model profile: ViT-H-14 has 986.11 million parameters. Heads do not show in it: vision's are 80 wide.
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(**_open_clip.VIT_H_14))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2) == 986.11
    assert model.vision_model.encoder.layers[0].self_attn.head_dim == 80
    assert model.text_model.encoder.layers[0].self_attn.head_dim == 64
