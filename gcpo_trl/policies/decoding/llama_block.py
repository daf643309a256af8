"""One Llama layer for one token a row, in as few kernels and as little Python as plain torch allows.

What is plain is computed from its weights: norms in one call, the linear maps of one input as one product, the residual
inside the last product. What is not (adapters, quantised layers, modules with hooks, other classes) is called as the
module it is, so that it acts as it does elsewhere. Which is which is decided once a rollout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Place:
    """Where a step's token lies, and what it sees.

    column: index of its key in the cache, a number, or ``(1,)`` where the device counts. cosine, signed_sine:
    (rows, 1, head_dim), its rotation. end: columns of the cache that are read. bias: for the scores, broadcast over
    (rows * heads, 1, end), times beta, 0 for none.
    """

    column: int | Tensor
    cosine: Tensor
    signed_sine: Tensor
    end: int
    bias: Tensor
    beta: int

    def write(self, cache: Tensor, entry: Tensor) -> None:
        """Put ``entry (rows, heads, dim)`` into its column of ``cache (rows, heads, room, dim)``."""
        if isinstance(self.column, int):
            cache.select(2, self.column).copy_(entry)
        else:
            cache.index_copy_(2, self.column, entry.unsqueeze(2))


class LinearMaps:
    """Linear maps of one input side by side: ``apply`` takes ``(rows, in)`` to ``(rows, sum of outs)``.

    Several plain maps are one product with a copy of their weights. It is a copy, although views of one storage would
    take no memory, because accelerate's ``save_model`` drops all but one tensor of a storage. Under autocast (``cast``)
    it is the copy that autocast would make and keep anyway, and a single map is copied too. ``memory`` is an earlier
    copy, which is written again in place. ``tensors`` are all that it reads.
    """

    def __init__(self, modules: Sequence[Any], cast: torch.dtype | None, memory: Sequence[Tensor] = ()) -> None:
        self.modules = list(modules)
        if not all(is_plain(module, nn.Linear) and module.bias is None for module in self.modules):
            self.tensors = [parameter for module in self.modules for parameter in module.parameters()]
            self.apply: Map = self.modules[0] if len(modules) == 1 else self._each
            return
        weight = modules[0].weight
        if cast is not None or len(modules) > 1:
            weight = _joined([module.weight for module in modules], cast or weight.dtype, memory)
        self.tensors = [weight]
        transposed = weight.t()
        self.apply = lambda inputs: torch.mm(inputs, transposed)
        if cast is None:  # autocast would round the residual
            self.onto = lambda residual, inputs: torch.addmm(residual, inputs, transposed)

    def onto(self, residual: Tensor, inputs: Tensor) -> Tensor:
        """``residual`` plus the map of ``inputs``."""
        return residual + self.apply(inputs)

    def _each(self, inputs: Tensor) -> Tensor:
        return torch.cat([module(inputs) for module in self.modules], dim=-1)


class LlamaBlock:
    """``layer`` is a ``LlamaDecoderLayer`` or has its names; ``swap`` turns a head's halves or pairs around.

    keys, values: ``(rows, heads, room, head_dim)``, written at `Place.column`. before: the block of an earlier rollout,
    whose memory is used again.
    """

    def __init__(
        self,
        layer: Any,
        swap: Map,
        cast: torch.dtype | None,
        keys: Tensor,
        values: Tensor,
        before: LlamaBlock | None = None,
    ) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.keys, self.values, self.swap = keys, values, swap
        self.keys_by_column, self.values_by_row = keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)
        self.scaling, self.dim, self.heads = attention.scaling, attention.head_dim, keys.shape[1]
        self.to_cache = cast is not None  # else everything has one precision
        self.softmax = F.softmax if keys.dtype in (torch.float32, torch.float64) else softmax_in_fp32
        self.first_norm, self.second_norm = norm_of(layer.input_layernorm), norm_of(layer.post_attention_layernorm)
        groups = {"project": [attention.q_proj, attention.k_proj, attention.v_proj], "output": [attention.o_proj]}
        self.mlp = mlp
        if is_plain(mlp, LlamaMLP):
            groups |= {"gate_up": [mlp.gate_proj, mlp.up_proj], "down": [mlp.down_proj]}
            self.activation = F.silu if is_plain(mlp.act_fn, nn.SiLU) else mlp.act_fn
        earlier = before.maps if before else {}
        self.maps = {
            name: LinearMaps(modules, cast, earlier[name].tensors if name in earlier else ())
            for name, modules in groups.items()
        }

    def __call__(self, hidden: Tensor, place: Place) -> Tensor:
        """From hidden states ``(rows, dim)`` to the next layer's."""
        hidden = self.maps["output"].onto(hidden, self._attend(self.first_norm(hidden), place))
        inputs = self.second_norm(hidden)
        if "down" not in self.maps:
            return hidden + self.mlp(inputs)
        gate, up = self.maps["gate_up"].apply(inputs).chunk(2, dim=-1)
        return self.maps["down"].onto(hidden, self.activation(gate) * up)

    def _attend(self, inputs: Tensor, place: Place) -> Tensor:
        rows, heads, dim = len(inputs), self.heads, self.dim
        states = self.maps["project"].apply(inputs).view(rows, -1, dim)
        # Queries and keys turn together. (Tensor.split takes twice the time of the function.)
        turned, value = torch.split_with_sizes(states, (states.shape[1] - heads, heads), 1)
        turned = torch.addcmul(turned * place.cosine, self.swap(turned), place.signed_sine)
        if self.to_cache:
            turned, value = turned.to(self.keys.dtype), value.to(self.keys.dtype)
        query, key = torch.split_with_sizes(turned, (turned.shape[1] - heads, heads), 1)
        place.write(self.keys, key)
        place.write(self.values, value)
        # Query heads that share a key head are its rows: two matrix products, no repeated keys. On a CPU this takes a
        # third of the time of scaled_dot_product_attention, whose tiles of queries stay empty.
        query = query.reshape(rows * heads, -1, dim)
        seen = self.keys_by_column.narrow(2, 0, place.end)
        scores = torch.baddbmm(place.bias, query, seen, beta=place.beta, alpha=self.scaling)
        return torch.bmm(self.softmax(scores, dim=-1), self.values_by_row.narrow(1, 0, place.end)).view(rows, -1)

    def storages(self) -> list[Tensor]:
        """Every tensor that a step reads or writes."""
        return [self.keys, self.values, *(tensor for maps in self.maps.values() for tensor in maps.tensors)]


def norm_of(module: nn.Module) -> Map:
    """The norm in few kernels where it is plain: in fp32 inside, as transformers computes it."""
    # transformers takes the norm in fp32 for fp64 weights too; so does the module, and rms_norm would not.
    if not is_plain(module, LlamaRMSNorm) or module.weight.dtype == torch.float64:
        return module
    weight, shape, eps = module.weight, module.weight.shape, module.variance_epsilon
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return partial(norm_by_length, weight=weight, share=1 / shape[0], eps=torch.tensor(eps))
    return lambda hidden: F.rms_norm(hidden, shape, weight, eps)


def norm_by_length(hidden: Tensor, weight: Tensor, share: float, eps: Tensor) -> Tensor:
    """RMS norm in fp32: the mean square is the squared length over the width.

    On a CPU this takes two thirds of the time of `rms_norm`, which there squares, averages and adds one by one.
    """
    hidden = hidden.float()
    length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
    return (hidden * torch.addcmul(eps, length, length, value=share).rsqrt_()).mul_(weight)


def softmax_in_fp32(scores: Tensor, dim: int) -> Tensor:
    """Softmax of half-precision scores, as transformers takes it."""
    return F.softmax(scores, dim=dim, dtype=torch.float32).to(scores.dtype)


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """Whether a module is exactly of this class, no subclass, and nothing watches or changes its calls."""
    return type(module) is kind and not (
        module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__
    )


def swap_halves(states: Tensor) -> Tensor:
    """Halves of the last axis changed round, as Llama's rotation pairs element i with i + dim / 2."""
    return states.roll(states.shape[-1] // 2, dims=-1)


@torch.no_grad()
def _joined(weights: Sequence[Tensor], dtype: torch.dtype, memory: Sequence[Tensor]) -> Tensor:
    """Weights one below the other, in the memory of an earlier call where that has the shape."""
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    if len(memory) != 1 or memory[0].shape != shape or memory[0].dtype != dtype:
        return torch.cat([weight.to(dtype) for weight in weights])
    first = 0
    for weight in weights:
        memory[0].narrow(0, first, len(weight)).copy_(weight)
        first += len(weight)
    return memory[0]
