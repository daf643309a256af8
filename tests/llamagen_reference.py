"""LlamaGen's forward pass written out from the released names and formulas, one sequence at a time, to compare with.

A released state dict of random numbers, and `logits`: neighbouring channels turn, the prefix is multiplied by zero, a
position sees real positions before it and itself.
"""

import math

import torch
from torch.nn import functional as F

WIDTH, HEADS, LAYERS, FFN, VOCAB, GRID, PREFIX, CAPTION, CLASSES = 24, 3, 2, 40, 50, 3, 6, 10, 7
HEAD = WIDTH // HEADS


def released_state(condition="text", seed=0, spread=0.4):
    """Weights under the released names, drawn wide enough that attention and logits differ from place to place."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return spread * torch.randn(*shape, generator=generator)

    state = {"tok_embeddings.weight": draw(VOCAB, WIDTH), "norm.weight": 1 + draw(WIDTH)}
    state["output.weight"] = draw(VOCAB, WIDTH)
    if condition == "text":
        state["cls_embedding.uncond_embedding"] = draw(PREFIX, CAPTION)
        state["cls_embedding.cap_proj.fc1.weight"] = draw(WIDTH, CAPTION)
        state["cls_embedding.cap_proj.fc2.weight"] = draw(WIDTH, WIDTH)
    else:
        state["cls_embedding.embedding_table.weight"] = draw(CLASSES + 1, WIDTH)
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        state[f"{name}.attention.wqkv.weight"] = draw(3 * WIDTH, WIDTH)
        state[f"{name}.attention.wo.weight"] = draw(WIDTH, WIDTH)
        state[f"{name}.feed_forward.w1.weight"] = draw(FFN, WIDTH)
        state[f"{name}.feed_forward.w3.weight"] = draw(FFN, WIDTH)
        state[f"{name}.feed_forward.w2.weight"] = draw(WIDTH, FFN)
        state[f"{name}.attention_norm.weight"] = 1 + draw(WIDTH)
        state[f"{name}.ffn_norm.weight"] = 1 + draw(WIDTH)
    return state


def angles(position, prefix):
    """Angle of each pair of channels at an image position: the first half by its row, the second by its column."""
    row, column = divmod(position - prefix, GRID)
    count = HEAD // 4
    return [place * 10000 ** (-2 * k / (HEAD / 2)) for place in (row, column) for k in range(count)]


def turn(states, prefix):
    """Rotate ``(seq, heads, channels)``: pair (2j, 2j+1) by its angle; the prefix becomes zero."""
    turned = torch.zeros_like(states)
    for position in range(prefix, len(states)):
        for pair, angle in enumerate(angles(position, prefix)):
            one, two = states[position, :, 2 * pair], states[position, :, 2 * pair + 1]
            turned[position, :, 2 * pair] = one * math.cos(angle) - two * math.sin(angle)
            turned[position, :, 2 * pair + 1] = two * math.cos(angle) + one * math.sin(angle)
    return turned


def rms(states, weight):
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-5) * weight


def prefix_of(state, condition):
    """Prefix embeddings of text features ``(PREFIX, CAPTION)`` or of a class id."""
    if "cls_embedding.embedding_table.weight" in state:
        return state["cls_embedding.embedding_table.weight"][condition][None]
    hidden = F.gelu(condition @ state["cls_embedding.cap_proj.fc1.weight"].T, approximate="tanh")
    return hidden @ state["cls_embedding.cap_proj.fc2.weight"].T


def logits(state, condition, codes, real=None):
    """``(codes + 1, VOCAB)``: what comes after the prefix and after each code. ``real`` marks real prefix positions."""
    start = prefix_of(state, condition)
    prefix = len(start)
    hidden = torch.cat([start, state["tok_embeddings.weight"][codes]])
    length = len(hidden)
    seen = torch.ones(length, dtype=torch.bool)
    seen[:prefix] = torch.ones(prefix, dtype=torch.bool) if real is None else real.bool()
    mask = torch.ones(length, length).tril().bool() & seen | torch.eye(length).bool()
    for layer in range(LAYERS):
        name = f"layers.{layer}"
        states = rms(hidden, state[f"{name}.attention_norm.weight"]) @ state[f"{name}.attention.wqkv.weight"].T
        query, key, value = (part.view(length, HEADS, HEAD) for part in states.split(WIDTH, dim=-1))
        query, key = turn(query, prefix), turn(key, prefix)
        scores = torch.einsum("qhc,khc->hqk", query, key) / math.sqrt(HEAD)
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        attended = torch.einsum("hqk,khc->qhc", weights, value).reshape(length, WIDTH)
        hidden = hidden + attended @ state[f"{name}.attention.wo.weight"].T
        states = rms(hidden, state[f"{name}.ffn_norm.weight"])
        gate = F.silu(states @ state[f"{name}.feed_forward.w1.weight"].T)
        hidden = hidden + (gate * (states @ state[f"{name}.feed_forward.w3.weight"].T)) @ (
            state[f"{name}.feed_forward.w2.weight"].T
        )
    return (rms(hidden, state["norm.weight"]) @ state["output.weight"].T)[prefix - 1 :]
