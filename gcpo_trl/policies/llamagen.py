"""LlamaGen, text- or class-conditional, through `gcpo_trl.models`.

Prompts travel as the ids of the text encoder (or as one class id); a prefix of features stands before the image instead
of them. Features come from one cache, so a policy is scored under what it was sampled from.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, AutoProcessor

from ..models import LlamaGenForImageGeneration
from ..models.llamagen.configuration import CLASS
from ..models.llamagen.text import TextEncoder, resolve
from ..objective.layout import Layout
from .base import NextLogits, PromptBatch
from .decoding.image_head import ALL, DECODE_BATCH, ImageScores, score_tokens, to_pictures
from .decoding.state import DecodeState, Generator, begin

MODEL_TYPES = ("llamagen",)
LORA_LAYERS = {
    "language_model": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj",
    "generation_head": r"lm_head",
}
# What stays whole where the body is quantised.
UNQUANTISED = ("lm_head", "vqmodel", "model.condition")


class LlamaGenPolicy:
    """LlamaGen as an `ImagePolicy`. ``model`` is the plain module, also where PEFT or an engine wraps it."""

    generates_images = True
    modules = {"language_model": "model", "generation_head": "lm_head"}
    default_modules = ("language_model", "generation_head")

    def __init__(
        self, model: LlamaGenForImageGeneration, processor: Any, text_encoder: TextEncoder | None = None
    ) -> None:
        self.model = model
        self.processor = processor
        config = model.config
        self.layout = image_layout(config)
        self.num_tokens = self.layout.tokens
        self.widths = (1,) * self.num_tokens
        self.text_encoder = text_encoder
        self.scored = ALL
        if text_encoder is None and config.condition != CLASS:
            name = resolve(config.caption_encoder, getattr(config, "_name_or_path", ""))
            config.caption_encoder = name  # a checkpoint of this run lies elsewhere and must find it too
            self.text_encoder = TextEncoder(name, config.condition_tokens)

    def set_generation(self, guidance_scale: float) -> None:
        """Note how images are drawn, for whoever loads a checkpoint."""
        self.model.generation_config.guidance_scale = guidance_scale

    # encode

    def encode(self, prompts: Sequence[Any]) -> PromptBatch:
        """Captions (strings, or conversations whose last message is one) as the text encoder's ids, left-padded.

        There are no unconditional ids: the unconditional prefix is the model's own, behind the same padding.
        """
        inputs = self.processor([caption_of(prompt) for prompt in prompts])
        ids, mask = (inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        classes = self.model.config.num_classes
        if self.text_encoder is None and bool((ids >= classes).any()):
            raise ValueError(f"a class-conditional LlamaGen takes classes 0 to {classes - 1} as prompts, got {prompts}")
        return PromptBatch(ids, mask, ids)

    def condition(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Condition and its mask ``(batch, condition_tokens)`` as the model takes them, from prompt ids."""
        if self.text_encoder is None:
            return ids[:, -1], torch.ones_like(ids[:, -1:])
        return self.text_encoder(ids, mask)

    # start / step

    @torch.no_grad()
    def start(
        self, prompts: PromptBatch, rows: Tensor, guided: bool, plain: bool = False, into: DecodeState | None = None
    ) -> tuple[DecodeState, NextLogits]:
        """Prefill conditional and unconditional prefixes once each, then copy their cache to the rows that need it."""
        body = self.model.model
        condition, mask = self.condition(prompts.ids, prompts.mask)
        # Autocast embeds a condition in another dtype than codes, to which training adds it up.
        dtype, rows = body.embed_tokens.weight.dtype, rows.to(mask.device)
        embeddings = body.condition(condition).to(dtype)
        if guided:
            embeddings = torch.cat([embeddings, body.condition.unconditional(len(embeddings)).to(dtype)])
            mask, rows = mask.repeat(2, 1), torch.cat([rows, rows + len(prompts.ids)])
        generator = Generator(body, self.model.lm_head, body.embed_tokens, self.token_table)
        return begin(generator, embeddings, mask, rows, self.num_tokens - 1, guided, plain, into)

    @torch.no_grad()
    def step(self, state: DecodeState, tokens: Tensor) -> NextLogits:
        """Append the newest token of each image, ``(batch, 1)``; the unconditional rows see the same token."""
        return state.step(tokens)

    # logits at given positions

    def attach_head(self, model: LlamaGenForImageGeneration, temperature: float) -> None:
        """Patch ``model.forward`` (TRL's ``fused_lm_head`` contract): the last ``num_tokens`` ids are image tokens.

        Which of them are scored is what ``self.scored`` says at that moment.
        """
        original, policy = model.forward, self

        def forward(module: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
            if not fused_lm_head:
                return original(*args, **kwargs)
            return policy.teacher_forced(module, kwargs["input_ids"], kwargs["attention_mask"], temperature)

        model.forward = types.MethodType(forward, model)

    def teacher_forced(
        self, model: LlamaGenForImageGeneration, input_ids: Tensor, attention_mask: Tensor, temperature: float
    ) -> ImageScores:
        """Score the image tokens that end ``input_ids`` ``(batch, prompt + num_tokens)``.

        Gradient: flows to the body and the head, from the tokens that ``self.scored`` names.
        """
        prompt, tokens = input_ids[:, : -self.num_tokens], input_ids[:, -self.num_tokens :]
        condition, mask = self.condition(prompt, attention_mask[:, : prompt.shape[1]])
        body = model.model
        # The last token predicts nothing, so it is not fed.
        embeddings = torch.cat([body.condition(condition), body.embed_tokens(tokens[:, :-1])], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), self.num_tokens - 1)], dim=1)
        hidden = body(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
        hidden = hidden[:, -self.num_tokens :]
        log_probs, entropies = score_tokens(model.lm_head, hidden, tokens, temperature, scored=self.scored)
        return ImageScores(log_probs=log_probs, entropy=entropies)

    # decode, layout

    @torch.no_grad()
    def pixels(self, tokens: Tensor) -> Tensor:
        """``(batch, height, width, 3)`` in [-1, 1] of token grids ``(batch, seq)``, still on the device."""
        parts = [self.model.decode_image_tokens(part) for part in tokens.split(DECODE_BATCH)]
        return torch.cat(parts).permute(0, 2, 3, 1)

    def decode(self, tokens: Tensor) -> list[Image.Image]:
        """Pictures of token grids ``(batch, seq)``."""
        return to_pictures(self.pixels(tokens))

    @torch.no_grad()
    def token_table(self, space: str = "aligner") -> Tensor:
        """``aligner``: the input embeddings. ``codebook``: the tokenizer's normalised codes, as released."""
        if space == "codebook":
            if self.model.vqmodel is None:
                raise ValueError("select_similarity_space='codebook' needs an image tokenizer; convert with --vq VQ.pt")
            return torch.nn.functional.normalize(self.model.vqmodel.quantize.embedding.weight, dim=-1)
        return self.model.model.embed_tokens.weight


def caption_of(prompt: Any) -> str:
    """The caption a prompt holds: itself, or the text of a conversation's last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if "text" in part)


def image_layout(config: Any) -> Layout:
    """The token grid."""
    return Layout.raster(config.grid_size, config.grid_size)


def adapt(model: LlamaGenForImageGeneration, processor: Any) -> LlamaGenPolicy:
    """The policy around a loaded model."""
    return LlamaGenPolicy(model, processor)


def load(model_id: str, **kwargs: Any) -> LlamaGenPolicy:
    """Load model and processor from a path or an id; keyword arguments go to ``from_pretrained``."""
    config = AutoConfig.from_pretrained(model_id)
    if config.model_type != "llamagen":
        raise ValueError(f"{model_id} holds a {config.model_type!r} model; this adapter loads 'llamagen' checkpoints")
    model = LlamaGenForImageGeneration.from_pretrained(model_id, **kwargs).eval()
    return LlamaGenPolicy(model, AutoProcessor.from_pretrained(model_id))
