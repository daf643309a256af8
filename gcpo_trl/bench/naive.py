"""The plain ways that the engine and the selection are measured against, written after a description of the released
code (kernels, syncs and stored tensors of its rollout and selection), not copied from it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..policies.janus import JanusPolicy


@torch.no_grad()
def rollout(policy: JanusPolicy, prompts: list[Any], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, entropy and group similarity by a cache that grows, keeping all logits and reading them afterwards.

    Every image runs its own unconditional prompt; the mask is concatenated, the token embedded through the aligner, and
    the similarity taken from a matrix of all pairs, once a token.
    """
    encoded, inner, group = policy.encode(prompts), policy.model.model, len(prompts)
    ids = torch.cat([encoded.ids, encoded.unconditional_ids])
    embeddings, mask = inner.language_model.embed_tokens(ids), encoded.mask.repeat(2, 1)
    cache, kept, tokens, similarity = None, [], [], []
    for _ in range(policy.num_tokens):
        outputs = inner.language_model(
            inputs_embeds=embeddings, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        cache = outputs.past_key_values
        logits = inner.generation_head(outputs.last_hidden_state[:, -1])
        conditional, unconditional = logits[:group], logits[group:]
        guided = unconditional + scale * (conditional - unconditional)
        kept.append(guided)
        token = torch.multinomial(guided.softmax(-1), 1)[:, 0]
        tokens.append(token)
        codes = policy.model.prepare_embeddings_for_image_generation(token)
        unit = torch.nn.functional.normalize(codes, dim=-1)
        pairs = unit @ unit.T
        similarity.append(pairs[~torch.eye(group, dtype=torch.bool, device=pairs.device)].mean())
        embeddings = codes.repeat(2, 1)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    probabilities = torch.stack(kept, dim=1).softmax(-1)
    entropy = -(probabilities * (probabilities + 1e-12).log()).sum(-1)
    return torch.stack(tokens, dim=1), entropy, torch.stack(similarity)


def select(entropy: Tensor, embeddings: Tensor, fraction: float) -> Tensor:
    """Critical tokens of one group, cell by cell and token by token: initial, steepest entropy, least similar.

    entropy (group, height, width), embeddings (group, seq, dim); returns (group, seq) bool.
    """
    group, height, width = entropy.shape
    count = int(fraction * height * width + 1e-9)
    chosen = torch.zeros(group, height * width, dtype=torch.bool)
    similarity = torch.stack([_similarity(embeddings[:, t]) for t in range(height * width)])
    for image in range(group):
        smooth = torch.zeros(height, width)
        for y in range(height):
            for x in range(width):
                smooth[y, x] = _mean_before(entropy[image], y, x)
        steep = torch.zeros(height, width)
        for y in range(height):
            for x in range(width):
                down = _slope(smooth[:, x], y)
                right = _slope(smooth[y], x)
                steep[y, x] = (down**2 + right**2).sqrt()
        chosen[image, :count] = True
        for scores in (steep.flatten(), -similarity):
            chosen[image, scores.masked_fill(chosen[image], -torch.inf).topk(count).indices] = True
    return chosen


def _similarity(embeddings: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(embeddings, dim=-1)
    return (unit @ unit.T)[~torch.eye(len(unit), dtype=torch.bool)].mean()


def _slope(line: Tensor, at: int) -> Tensor:
    """Central difference, one-sided at the ends."""
    after, before = min(at + 1, len(line) - 1), max(at - 1, 0)
    return (line[after] - line[before]) / (after - before)


def _mean_before(entropy: Tensor, y: int, x: int) -> Tensor:
    """Mean over the cell, its left and its three upper neighbours, where they exist."""
    cells = [(y, x), (y, x - 1), (y - 1, x - 1), (y - 1, x), (y - 1, x + 1)]
    inside = [entropy[row, column] for row, column in cells if row >= 0 and 0 <= column < entropy.shape[1]]
    return torch.stack(inside).mean()
