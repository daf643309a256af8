"""BLIP-VQA: a tiny random BLIP saved to disk answers as the forward pass written out below says."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import gelu, interpolate, layer_norm, linear
from transformers import BlipConfig, BlipForQuestionAnswering, PreTrainedTokenizerFast

from reward_funcs import blip_vqa
from reward_funcs.blip_vqa import Scorer

# [DEC] and [ENC] come last, as in BLIP; the tokenizer on disk knows neither.
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "?", "yes", "no", "a", "red", "blue", "car", "sheep", "and", "the"]
DECODE, ENCODE = len(WORDS), len(WORDS) + 1
SIDE, WIDTH, HEADS = 16, 8, 2
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer(lowercase=True)
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": HEADS}
    text = {"vocab_size": len(WORDS) + 2, "encoder_hidden_size": WIDTH, "bos_token_id": DECODE, "pad_token_id": 0}
    text |= {"max_position_embeddings": 40, "sep_token_id": 3, "eos_token_id": 3}
    config = BlipConfig(
        text_config=size | text, vision_config=size | {"image_size": SIDE, "patch_size": 8}, projection_dim=WIDTH
    )
    model = BlipForQuestionAnswering(config)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that none may be swapped unseen
            parameter.normal_(std=1.0)
    path = tmp_path_factory.mktemp("blip")
    model.save_pretrained(path)
    tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def scorer(folder):
    return Scorer(model=folder, image_size=SIDE, device="cpu", batch_size=2)


def pictures(count, side=SIDE):
    generator = np.random.default_rng(1)
    return [Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


# The forward pass, from the weights by name.


class Written:
    def __init__(self, folder):
        self.model = BlipForQuestionAnswering.from_pretrained(folder).eval()
        self.weights = self.model.state_dict()

    def layer(self, name, hidden):
        return linear(hidden, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name, hidden):
        return layer_norm(hidden, (WIDTH,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], 1e-12)

    def attention(self, name, hidden, memory):
        """One sequence, (seq, dim): no padding, so no mask."""
        query, key, value = (
            self.layer(f"{name}.self.{part}", states).view(len(states), HEADS, -1).transpose(0, 1)
            for part, states in (("query", hidden), ("key", memory), ("value", memory))
        )
        shares = (query @ key.transpose(1, 2) / math.sqrt(WIDTH / HEADS)).softmax(-1)
        mixed = (shares @ value).transpose(0, 1).reshape(len(hidden), WIDTH)
        return self.norm(f"{name}.output.LayerNorm", self.layer(f"{name}.output.dense", mixed) + hidden)

    def text(self, name, ids, memory):
        embeddings = f"{name}.embeddings"
        hidden = self.weights[f"{embeddings}.word_embeddings.weight"][ids]
        hidden = hidden + self.weights[f"{embeddings}.position_embeddings.weight"][: len(ids)]
        hidden = self.norm(f"{embeddings}.LayerNorm", hidden)
        for block in (f"{name}.encoder.layer.0", f"{name}.encoder.layer.1"):
            hidden = self.attention(f"{block}.attention", hidden, hidden)
            hidden = self.attention(f"{block}.crossattention", hidden, memory)
            inner = gelu(self.layer(f"{block}.intermediate.dense", hidden))
            hidden = self.norm(f"{block}.output.LayerNorm", self.layer(f"{block}.output.dense", inner) + hidden)
        return hidden

    def chance(self, image, words):
        """P(yes) / (P(yes) + P(no)) by the softmax over the vocabulary, as the released vqa_prob computes it."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        pixels = (pixels - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
        with torch.no_grad():
            seen = self.model.vision_model(pixels[None].float()).last_hidden_state[0]
            asked = self.text("text_encoder", [ENCODE, *(WORDS.index(word) for word in words), 3], seen)
            answer = self.text("text_decoder.bert", [DECODE], asked)
            head = "text_decoder.cls.predictions"
            answer = self.norm(f"{head}.transform.LayerNorm", gelu(self.layer(f"{head}.transform.dense", answer)))
            chances = self.layer(f"{head}.decoder", answer)[0].softmax(-1)
        yes, no = chances[WORDS.index("yes")], chances[WORDS.index("no")]
        return float(yes / (yes + no))


def test_reward_is_the_product_over_phrases_of_the_written_out_forward(scorer, folder):
    written, images = Written(folder), pictures(4)
    prompts = ["a red car and a blue sheep", "The car.", "a red car and a sheep", "a blue car"]
    expected = [
        written.chance(images[0], ["a", "red", "car", "?"]) * written.chance(images[0], ["a", "blue", "sheep", "?"]),
        written.chance(images[1], ["the", "car", "?"]),  # in lower case, the full stop outside
        None,
        written.chance(images[3], ["a", "blue", "car", "?"]),
    ]
    rewards = blip_vqa.reward(prompts, [images[0], images[1], None, images[3]], scorer=scorer)
    assert rewards == [None if value is None else pytest.approx(value, rel=0, abs=2e-6) for value in expected]
    assert len({round(value, 3) for value in expected if value is not None}) == 3


def test_questions_stay_with_their_pictures_across_batches(scorer):
    # Lengths differ inside a batch: an answer must not read another question's padding.
    images = pictures(5)
    prompts = ["a car", "a red car and a blue sheep", "the sheep", "a blue sheep and the car", "a red car"]
    together = blip_vqa.reward(prompts, images, scorer=scorer)
    alone = [
        blip_vqa.reward([prompt], [image], scorer=scorer)[0] for prompt, image in zip(prompts, images, strict=True)
    ]
    assert together == [pytest.approx(value, rel=0, abs=2e-6) for value in alone]
    assert len({round(value, 5) for value in together}) == 5


def test_a_larger_picture_stretches_the_position_embeddings(folder):
    # 24 x 24 is 3 x 3 patches; the model has 2 x 2 positions and the class token's.
    (image,) = pictures(1, side=24)
    written = Written(folder)
    positions = written.weights["vision_model.embeddings.position_embedding"]
    grid = positions[:, 1:].reshape(1, 2, 2, WIDTH).permute(0, 3, 1, 2)
    grid = interpolate(grid, size=(3, 3), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    stretched = torch.nn.Parameter(torch.cat([positions[:, :1], grid.reshape(1, 9, WIDTH)], dim=1))
    written.model.vision_model.embeddings.position_embedding = stretched
    (value,) = blip_vqa.reward(["a red car"], [image], scorer=Scorer(model=folder, image_size=24, device="cpu"))
    assert value == pytest.approx(written.chance(image, ["a", "red", "car", "?"]), rel=0, abs=2e-6)


def test_pictures_are_stretched_to_a_square(scorer):
    # Columns red, red, blue, blue come out the same at any height.
    tall = Image.new("RGB", (SIDE, 2 * SIDE), "red")
    wide = Image.new("RGB", (2 * SIDE, SIDE), "red")
    assert blip_vqa.reward(["a car"], [tall], scorer=scorer) == blip_vqa.reward(["a car"], [wide], scorer=scorer)


def test_at_most_eight_phrases_and_none_without_a_phrase(scorer):
    (image,) = pictures(1)
    column = ['{"phrases": ["a car", "a car", "a car", "a car", "a car", "a car", "a car", "a car", "a sheep"]}']
    (one,) = blip_vqa.reward(["x"], [image], ['{"phrases": ["a car"]}'], scorer)
    (many,) = blip_vqa.reward(["x"], [image], column, scorer)
    assert many == pytest.approx(one**8, rel=1e-4)
    assert blip_vqa.reward(["x"], [image], ['{"phrases": []}'], scorer) == [None]


def test_questions_are_cleaned_as_released():
    assert blip_vqa.question("The (red) car, #1!") == "the red car, 1?"


def test_a_missing_model_says_what_to_download(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"hf download Salesforce/blip-vqa-capfilt-large .*BLIP_VQA_MODEL=DIR"):
        blip_vqa.reward(["a car"], pictures(1), scorer=Scorer(model=str(tmp_path / "absent"), device="cpu"))


def test_a_vocabulary_without_the_tokens_is_an_error(folder, tmp_path):
    model = BlipForQuestionAnswering.from_pretrained(folder)
    model.config.text_config.bos_token_id = ENCODE  # then nothing is left for [ENC]
    model.save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"its vocabulary lacks \[ENC\]"):
        blip_vqa.reward(["a car"], pictures(1), scorer=Scorer(model=str(tmp_path), image_size=SIDE, device="cpu"))


def test_environment_names_the_model(monkeypatch):
    monkeypatch.setenv("BLIP_VQA_MODEL", "/weights/blip")
    assert Scorer().model == "/weights/blip"
    assert Scorer().image_size == 480
