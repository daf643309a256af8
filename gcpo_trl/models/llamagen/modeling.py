"""The LlamaGen transformer on transformers' Llama: attention, cache, checkpointing and LoRA targets are Llama's own.

Three things differ from Llama (autoregressive/models/gpt.py): positions lie on a grid, the sequence starts with a
prefix of condition embeddings whose queries and keys are zero, and padded prefix positions see themselves. The released
rotation turns neighbouring channels; this one turns halves, as Llama does, so conversion reorders the rows of the query
and key projections (`convert`), which changes no product of the two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, LlamaModel, LlamaPreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from .configuration import CLASS, LlamaGenConfig
from .vq import LlamaGenVQModel


class GridRotaryEmbedding(nn.Module):
    """Cosines and sines ``(batch, seq, head_dim)`` of positions: zero on the prefix, then row and column of the grid.

    Zero, not one: queries and keys of the prefix vanish, so every token attends evenly to the prefix it sees.
    """

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.config = config

    def table(self, device: Any) -> tuple[Tensor, Tensor]:
        """Of all positions, ``(condition_tokens + grid_size ** 2, head_dim)`` each."""
        config, quarter = self.config, self.config.head_dim // 4
        theta = (config.rope_parameters or {}).get("rope_theta", 10000.0)
        frequencies = theta ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
        steps = torch.arange(config.grid_size, device=device)[:, None] * frequencies
        rows = steps.repeat_interleave(config.grid_size, dim=0)
        columns = steps.repeat(config.grid_size, 1)
        angles = torch.cat([rows, columns], dim=-1).repeat(1, 2)
        prefix = angles.new_zeros(config.condition_tokens, config.head_dim)
        return torch.cat([prefix, angles.cos()]), torch.cat([prefix, angles.sin()])

    @torch.no_grad()
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        cosine, sine = self.table(x.device)
        return cosine[position_ids].to(x.dtype), sine[position_ids].to(x.dtype)


class CaptionEmbedding(nn.Module):
    """Text features ``(batch, condition_tokens, caption_dim)`` -> prefix; without a caption a fixed stand-in for them.

    ``uncond_embedding`` is a buffer, as released: no optimiser ever moves it.
    """

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        stand_in = torch.randn(config.condition_tokens, config.caption_dim) / config.caption_dim**0.5
        self.register_buffer("uncond_embedding", stand_in)
        self.fc1 = nn.Linear(config.caption_dim, config.hidden_size, bias=False)
        self.fc2 = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(features.to(self.fc1.weight.dtype)), approximate="tanh"))

    def unconditional(self, batch: int) -> Tensor:
        """The prefix of no caption, ``(batch, condition_tokens, hidden_size)``."""
        return self(self.uncond_embedding).expand(batch, -1, -1)


class ClassEmbedding(nn.Module):
    """Class ids ``(batch,)`` -> a prefix of one token; the last row of the table stands for no class."""

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(config.num_classes + 1, config.hidden_size)

    def forward(self, classes: Tensor) -> Tensor:
        return self.embedding_table(classes)[:, None]

    def unconditional(self, batch: int) -> Tensor:
        """The prefix of no class, ``(batch, 1, hidden_size)``."""
        return self.embedding_table.weight[-1].expand(batch, 1, -1)


class LlamaGenLayer(LlamaDecoderLayer):
    """Llama's layer with the dropouts of pre-training, which are off (0) unless the configuration says otherwise."""

    def __init__(self, config: LlamaGenConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        self.resid_dropout = nn.Dropout(config.resid_dropout)
        self.ffn_dropout = nn.Dropout(config.ffn_dropout)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + self.resid_dropout(attended)
        return hidden_states + self.ffn_dropout(self.mlp(self.post_attention_layernorm(hidden_states)))


class LlamaGenModel(LlamaModel):
    """The body: prefix and image embeddings in, last hidden states out. ``inputs_embeds`` starts with the prefix."""

    config: LlamaGenConfig
    config_class = LlamaGenConfig
    _no_split_modules = ["LlamaGenLayer"]
    _supports_flash_attn = False  # flash attention takes no mask of its own, and padded prefixes need one

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        self.layers = nn.ModuleList(LlamaGenLayer(config, index) for index in range(config.num_hidden_layers))
        self.rotary_emb = GridRotaryEmbedding(config)
        self.condition = ClassEmbedding(config) if config.condition == CLASS else CaptionEmbedding(config)
        self.token_dropout = nn.Dropout(config.token_dropout)
        self.post_init()

    def positions(self, mask: Tensor) -> Tensor:
        """Position ids ``(batch, seq)``: padding counts, so that every image starts at the same place."""
        return torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """``attention_mask``: (batch, keys), 1 on real positions, with those in the cache; None is all real."""
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if attention_mask is not None and attention_mask.dim() == 2:
            attention_mask = prefix_mask(attention_mask, inputs_embeds)
        return super().forward(inputs_embeds=self.token_dropout(inputs_embeds), attention_mask=attention_mask, **kwargs)


class LlamaGenForImageGeneration(LlamaPreTrainedModel, GenerationMixin):
    """Body, head over the image codes, and the image tokenizer where the checkpoint has one."""

    config: LlamaGenConfig
    config_class = LlamaGenConfig
    _no_split_modules = ["LlamaGenLayer"]
    _supports_flash_attn = False

    def __init__(self, config: LlamaGenConfig) -> None:
        super().__init__(config)
        self.model = LlamaGenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.vqmodel = LlamaGenVQModel(config.vq_config) if config.vq_config is not None else None
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        condition: Tensor | None = None,
        condition_mask: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``(batch, image tokens + 1, vocab)`` of the codes after the prefix, and after each code given.

        input_ids: image codes ``(batch, seq)``, may be None. condition: text features ``(batch, condition_tokens,
        caption_dim)``, left-padded as ``condition_mask`` ``(batch, condition_tokens)`` says, or class ids ``(batch,)``;
        None when ``past_key_values`` holds the prefix (then there is one row of logits a code, and ``condition_mask``
        stays the same). labels: the ``seq`` codes to predict; the loss is their mean cross-entropy.
        """
        parts = [] if condition is None else [self.model.condition(condition)]
        parts += [] if input_ids is None else [self.model.embed_tokens(input_ids)]
        if not parts:
            raise ValueError("neither condition nor input_ids was given; pass a condition to start an image")
        embeddings = torch.cat(parts, dim=1)
        mask = None
        if condition_mask is not None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            images = seen + embeddings.shape[1] - condition_mask.shape[1]
            mask = torch.cat([condition_mask, condition_mask.new_ones(len(condition_mask), images)], dim=1)
        out = self.model(inputs_embeds=embeddings, attention_mask=mask, past_key_values=past_key_values, **kwargs)
        first = 0 if condition is None else self.config.condition_tokens - 1
        logits = self.lm_head(out.last_hidden_state[:, first:]).float()
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, : labels.shape[1]].flatten(0, 1), labels.flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=out.past_key_values)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Not transformers' loop, which knows neither guidance between two prefixes nor images."""
        raise NotImplementedError(
            "LlamaGen draws with gcpo_trl: `gcpo sample`, or gcpo_trl.rollout.sample on "
            "gcpo_trl.policies.adapt(model, processor)"
        )

    def decode_image_tokens(self, tokens: Tensor) -> Tensor:
        """Pixels ``(batch, 3, side, side)``, about [-1, 1] and not clamped, of code ids ``(batch, seq)``."""
        if self.vqmodel is None:
            raise ValueError(
                "this LlamaGen has no image tokenizer, so its codes give no pictures; convert it again with --vq VQ.pt"
            )
        return self.vqmodel.decode(tokens)


def prefix_mask(mask: Tensor, embeddings: Tensor) -> Tensor:
    """What is added to attention scores ``(batch, 1, queries, keys)``: causal, real keys only, and always oneself.

    Without oneself a padded position would see nothing, and softmax over nothing is NaN.
    """
    keys, queries = mask.shape[1], embeddings.shape[1]
    at = torch.arange(keys - queries, keys, device=mask.device)[:, None]
    key = torch.arange(keys, device=mask.device)
    seen = (key <= at) & mask[:, None, None].bool() | (key == at)
    added = torch.zeros(seen.shape, dtype=embeddings.dtype, device=mask.device)
    return added.masked_fill(~seen, torch.finfo(embeddings.dtype).min)
