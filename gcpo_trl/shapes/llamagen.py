"""The tiny LlamaGen of the shapes world: the tiny Janus' image tokenizer, a T5 of its own, their pretraining."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import JanusVQVAE, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ..models import LlamaGenConfig, LlamaGenForImageGeneration, LlamaGenProcessor
from ..models.llamagen.text import TextEncoder
from ..policies.llamagen import LlamaGenPolicy
from .build import save_atomically, vocabulary
from .train_policy import STAGES

TEXT_ENCODER = "text_encoder"  # the folder of the T5, inside the model's
CAPTION_TOKENS = 16  # the longest caption has 10 words and an end
CAPTION_DIM = 96


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ends a caption as T5's does; padding is 0 and the end is 1, as there."""
    words = {word: index for index, word in enumerate(["<pad>", "</s>", *vocabulary()[8:]])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def build_processor() -> LlamaGenProcessor:
    return LlamaGenProcessor(build_tokenizer(), max_length=CAPTION_TOKENS)


def build_text_encoder() -> T5EncoderModel:
    """A T5 encoder of flan-t5's kind, small and random."""
    config = T5Config(
        vocab_size=len(build_tokenizer()),
        d_model=CAPTION_DIM,
        d_kv=24,
        num_heads=4,
        d_ff=192,
        num_layers=3,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def build_model(tokenizer: JanusVQVAE, hidden_size: int, layers: int, heads: int) -> LlamaGenForImageGeneration:
    """A random LlamaGen around the weights of a trained image tokenizer, whose codes have length 1 as LlamaGen's do."""
    vq_config = {name: value for name, value in tokenizer.config.to_dict().items() if name != "model_type"}
    config = LlamaGenConfig(
        vocab_size=tokenizer.config.num_embeddings,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        condition_tokens=CAPTION_TOKENS,
        caption_dim=CAPTION_DIM,
        grid_size=tokenizer.config.num_patches,
        caption_encoder=TEXT_ENCODER,
        vq_config=vq_config,
    )
    model = LlamaGenForImageGeneration(config)
    usage = model.vqmodel.quantize.codebook_used
    model.vqmodel.load_state_dict(tokenizer.state_dict() | {"quantize.codebook_used": usage})
    return model


class LlamaGenLearner:
    """Transformer and text encoder train together here; in reinforcement learning the text encoder is frozen."""

    # It takes hold of colours sooner than the tiny Janus: the later stages would leave too little for a reward.
    stages = STAGES[:1]

    def __init__(
        self, model: LlamaGenForImageGeneration, processor: LlamaGenProcessor, text_encoder: T5EncoderModel
    ) -> None:
        self.model, self.processor, self.text_encoder = model, processor, text_encoder
        self.parameters = [*model.model.parameters(), *model.lm_head.parameters(), *text_encoder.parameters()]

    @classmethod
    def fresh(cls, tokenizer: JanusVQVAE, hidden_size: int, layers: int, heads: int) -> LlamaGenLearner:
        """A random policy and text encoder around the weights of a trained image tokenizer."""
        text_encoder = build_text_encoder()
        return cls(build_model(tokenizer, hidden_size, layers, heads), build_processor(), text_encoder)

    @classmethod
    def open(cls, folder: Path) -> LlamaGenLearner:
        """What `save` wrote, in fp32."""
        model = LlamaGenForImageGeneration.from_pretrained(folder, dtype=torch.float32)
        text_encoder = T5EncoderModel.from_pretrained(folder / TEXT_ENCODER, dtype=torch.float32)
        return cls(model, build_processor(), text_encoder)

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Model, processor and text encoder; the ones in memory then have the rounded weights, in fp32."""
        parts = self.model.to(dtype), self.processor
        save_atomically(folder, *parts, **{TEXT_ENCODER: self.text_encoder.to(dtype)})
        self.model.float()
        self.text_encoder.float()

    def policy(self) -> LlamaGenPolicy:
        encoder = self.text_encoder.requires_grad_(False).eval()
        return LlamaGenPolicy(self.model, self.processor, TextEncoder(TEXT_ENCODER, CAPTION_TOKENS, lambda *_: encoder))

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, ...]:
        """Ids and mask ``(captions, CAPTION_TOKENS)``, left-padded."""
        inputs = self.processor(captions, padding="max_length")
        return inputs["input_ids"], inputs["attention_mask"]

    def loss(self, encoded: tuple[torch.Tensor, ...], tokens: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
        ids, mask = encoded
        features = self.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state * mask[..., None]
        nothing = self.model.model.condition.uncond_embedding
        features = torch.where(dropped[:, None, None], nothing, features)
        logits = self.model(tokens[:, :-1], features, mask).logits
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
