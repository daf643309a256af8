"""Memory of a training run on one device, on paper: from shapes and settings, with no weight loaded.

    total = held always + max(rollout, update)
    held    parameters, optimizer, reference, DDP's buckets
    rollout cache of keys and values, VQ decoder
    update  gradients, activations, one tile of logits

It is an upper bound of what tensors hold: gradients grow while activations are freed, and both are counted whole.
Not in it: the CUDA context, fragmentation, workspaces of cuDNN and NCCL, DeepSpeed's communication buckets.

All sizes are bytes. A model on the meta device is enough: only shapes, dtypes and ``requires_grad`` are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..policies.decoding.image_head import CHUNK, DECODE_BATCH
from ..policies.decoding.llama_decoder import WINDOW
from ..policies.janus import JanusPolicy, image_layout

GIB = 2**30
FP32 = 4
ADAMW = ("adamw_torch", "adamw_torch_fused")  # two moments in the parameter's dtype; others are not counted
ADAM_STEP = 4  # torch.optim.AdamW keeps the step count of each parameter as one fp32 number
# Bytes a logit that the backward pass of `score_tokens` needs: log-softmax, probabilities and bounded log-probabilities
# in fp32. Beside them live the logits and a gradient of theirs, fp32.
LOGIT_SAVED = 3 * FP32
LOGIT_ALIVE = LOGIT_SAVED + 2 * FP32
DECODER_ALIVE = 3  # a residual block of the VQ decoder holds its input, the input of a convolution and its output
ZERO3_LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters: gathered parameters it keeps in the forward pass
READERS = (  # linear layers by what they read, and whether attention keeps that anyway
    (("q_proj", "k_proj", "v_proj"), "hidden", False),
    (("o_proj",), "query", True),
    (("gate_proj", "up_proj"), "hidden", False),
    (("down_proj",), "inner", False),
)


@dataclass(frozen=True)
class Run:
    """Settings of a run that memory depends on, a device.

    rows: images of a micro-batch. sampled: images drawn at once. prompt: text tokens before an image, padding included.
    mixed: bf16 or fp16 is on. graphs: CUDA graphs draw, so the sampler's memory stays between rollouts.
    rewards: name and bytes of each reward, None where it declares none.
    """

    rows: int
    sampled: int
    guided: bool
    prompt: int
    mixed: bool
    checkpointing: bool
    reference: bool
    optimizer: str = "adamw_torch"
    lora_dropout: bool = False
    gpus: int = 1
    zero: int = 0
    graphs: bool = False
    rewards: Mapping[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("rows", "sampled", "prompt", "gpus"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.zero not in (0, 2, 3):
            raise ValueError(f"zero={self.zero} is not counted; give 0 (no DeepSpeed), 2 or 3")


@dataclass(frozen=True)
class Row:
    """One line of the table. ``size`` is None if it is not known. when: always, rollout, update or shown (no part)."""

    name: str
    size: int | None
    when: str
    how: str


@dataclass(frozen=True)
class Shape:
    """Widths and counts of an image model, from its configuration."""

    hidden: int
    layers: int
    heads: int
    query: int
    kv: int
    inner: int
    head_dim: int
    tokens: int
    codes: int
    head_width: int
    side: int
    channels: int

    @classmethod
    def of(cls, config: Any) -> Shape:
        """The shape of a ``JanusConfig``; raises ValueError for other families, whose layers are not known here."""
        if config.model_type != "janus":
            raise ValueError(f"the table is for image models of type 'janus'; this is a {config.model_type!r} model")
        text, vq, ((height, width),) = config.text_config, config.vq_config, image_layout(config).grids
        levels = vq.channel_multiplier
        return cls(
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            query=text.num_attention_heads * text.head_dim,
            kv=text.num_key_value_heads * text.head_dim,
            inner=text.intermediate_size,
            head_dim=text.head_dim,
            tokens=height * width,
            codes=vq.num_embeddings,
            head_width=vq.projection_dim,
            side=height * 2 ** (len(levels) - 1),
            channels=vq.base_channels * max(levels[:2]),  # the last upsampling works in the channels of the level below
        )


@dataclass(frozen=True)
class Layer:
    """What decides how much a decoder layer keeps: its widths, what trains in it, and bytes of its numbers.

    full: linear layers that train themselves. lora: rank of the adapter of a linear layer. stream: bytes of a number
    between layers. compute: bytes of a number that a matrix product reads. adapter: bytes of an adapter's weight.
    """

    hidden: int
    query: int
    kv: int
    inner: int
    heads: int
    stream: int
    compute: int
    adapter: int = FP32
    full: frozenset[str] = frozenset()
    lora: Mapping[str, int] = field(default_factory=dict)
    norms: bool = True
    dropout: bool = False


def size_of(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of parameters, also of those on the meta device."""
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def reached(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that train and that the loss reaches; an adapter in the vision tower is trained and never reached."""
    parts = tuple(f".{path}." for path in JanusPolicy.modules.values())
    return [p for name, p in model.named_parameters() if p.requires_grad and any(part in f".{name}" for part in parts)]


def layer_of(model: nn.Module, shape: Shape, run: Run) -> Layer:
    """The first decoder layer, which stands for all."""
    full, lora, norms, adapter, weight = set(), {}, False, FP32, FP32
    for name, parameter in _language_model(model).layers[0].named_parameters():
        projection = next((part for part in name.split(".") if part.endswith("_proj")), None)
        if "lora_" in name:
            adapter = parameter.element_size()
            if "lora_A" in name and projection:
                lora[projection] = parameter.shape[0]
            continue
        weight = parameter.element_size()
        if projection is None:
            norms |= parameter.requires_grad
        elif parameter.requires_grad:
            full.add(projection)
    # DeepSpeed casts the whole model; torch's autocast leaves fp32 weights, and with them what runs between layers.
    stream = 2 if run.mixed and run.zero else weight
    return Layer(
        shape.hidden,
        shape.query,
        shape.kv,
        shape.inner,
        shape.heads,
        stream=stream,
        compute=2 if run.mixed else weight,
        adapter=2 if run.mixed and run.zero else adapter,
        full=frozenset(full),
        lora=lora,
        norms=norms,
        dropout=run.lora_dropout,
    )


def _language_model(model: nn.Module) -> Any:
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped  # PEFT's wrapper
    return base.model.language_model


def kept_by_a_layer(layer: Layer, seq: int) -> int:
    """Bytes a token that one decoder layer of transformers' Llama keeps for its backward pass.

    RMSNorm, twice: its input in fp32, the inverse root, and, if its weight trains, the normalised input.
    Attention: query, keys, values and its own output; the log of the normaliser, a head; the row of the padding mask,
    which torch turns into numbers in each layer.
    MLP: the gate before and after its activation, and the other factor.
    Linear layers that train: what they read, see `_read`.
    """
    norm = FP32 * layer.hidden + FP32 + layer.stream * layer.hidden * layer.norms
    attention = layer.compute * (2 * layer.query + 2 * layer.kv + seq) + FP32 * layer.heads
    return 2 * norm + attention + 3 * layer.compute * layer.inner + _read(layer)


def _read(layer: Layer) -> int:
    """Bytes a token of what the trained linear layers of a layer read.

    Layers that read the same tensor share it. Each has a copy of its own where the tensor must be cast for it:
    autocast casts fp32 for each linear layer, and PEFT casts to the adapter's dtype. Dropout makes a copy and a mask.
    """
    total = 0
    for names, width, kept in READERS:
        cast = width == "hidden" and layer.stream != layer.compute
        apart = cast or layer.dropout or layer.adapter != layer.compute
        full = sum(name in layer.full for name in names)
        ranks = [layer.lora[name] for name in names if name in layer.lora]
        copies = (full if cast else 0) + (len(ranks) if apart else 0)
        shared = not kept and ((full and not cast) or (ranks and not apart))
        total += getattr(layer, width) * (layer.compute * (copies + bool(shared)) + layer.dropout * len(ranks))
        total += layer.compute * sum(ranks)
    return total


def activations(model: nn.Module, run: Run, checkpointing: bool) -> int:
    """Bytes kept between the forward and the backward pass of one micro-batch, without those of the logits.

    Checkpointed, a layer keeps its input alone, and one layer at a time is computed again.
    """
    shape = Shape.of(model.config)
    layer = layer_of(model, shape, run)
    seq = run.prompt + shape.tokens - 1  # the last image token predicts nothing and is not fed
    tokens, images = run.rows * seq, run.rows * shape.tokens
    kept = kept_by_a_layer(layer, seq)
    body = shape.layers * layer.stream * shape.hidden + kept if checkpointing else shape.layers * kept
    end = FP32 * shape.hidden + FP32 + layer.stream * shape.hidden * layer.norms  # the last norm
    rotary = 2 * layer.stream * shape.head_dim  # one cosine and one sine for all layers
    if images > CHUNK:  # `score_tokens` works in tiles, of which only the input is kept
        head = layer.stream * shape.hidden
    else:
        trains = any(p.requires_grad and "generation_head" in name for name, p in model.named_parameters())
        head = layer.compute * (shape.head_width + trains * (shape.hidden + shape.head_width))
    return tokens * (body + end + rotary) + images * head


def logits_tile(model: nn.Module, run: Run) -> int:
    """Bytes of one tile of logits in its backward pass; a tile is at most `CHUNK` positions."""
    shape = Shape.of(model.config)
    return min(run.rows * shape.tokens, CHUNK) * shape.codes * LOGIT_ALIVE


def cache(model: nn.Module, run: Run) -> int:
    """Bytes of keys and values while sampling: 2 x layers x rows x positions x kv width x bytes; guidance doubles rows.

    The last token is drawn and not fed; positions are rounded up to `WINDOW`; autocast's cache is half.
    """
    shape = Shape.of(model.config)
    rows = run.sampled * (2 if run.guided else 1)
    number = layer_of(model, shape, run).compute
    positions = -(-(run.prompt + shape.tokens - 1) // WINDOW) * WINDOW
    return 2 * shape.layers * rows * positions * shape.kv * number


def joined(model: nn.Module, run: Run) -> int:
    """Bytes of the weights that the sampler lays side by side (`LinearMaps`): copies of plain layers."""
    layer = layer_of(model, Shape.of(model.config), run)
    groups = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")]
    groups += [("o_proj",), ("down_proj",)] if layer.stream != layer.compute else []
    names = {name for group in groups if not set(group) & set(layer.lora) for name in group}
    weights = _language_model(model).layers.named_parameters()
    return layer.compute * sum(p.numel() for name, p in weights if names & set(name.split(".")))


def estimate(model: nn.Module, run: Run) -> list[Row]:
    """Every row of the table but the total. ``model`` is on any device, frozen and adapted as it will train."""
    rows = [*_parameters(model, run), *_rollout(model, run), *_update(model, run)]
    rows += [Row(f"reward {name}", size, "always", "declared by the reward") for name, size in run.rewards.items()]
    return rows


def _parameters(model: nn.Module, run: Run) -> list[Row]:
    """Rows that hold as long as the run: weights, optimizer, reference. ZeRO-2 splits the optimizer, ZeRO-3 all."""
    parameters = list(model.parameters())
    sizes = [p.numel() * (2 if run.zero and run.mixed else p.element_size()) for p in parameters]
    trained = sum(size for p, size in zip(parameters, sizes, strict=True) if p.requires_grad)
    frozen = sum(sizes) - trained
    reference = trained + frozen if run.reference else 0
    if run.optimizer not in ADAMW:
        optimizer, how = None, f"optim={run.optimizer} is not counted"
    elif run.zero:
        optimizer = 3 * FP32 * sum(p.numel() for p in parameters if p.requires_grad) // run.gpus
        how = "fp32 master and two fp32 moments, split over the devices"
    else:
        optimizer = sum(2 * p.numel() * p.element_size() + ADAM_STEP for p in reached(model))
        how = "two moments in the dtype of the weight, no master copy"
    share = run.gpus if run.zero == 3 else 1
    return [
        Row("parameters, trained", trained // share, "always", "as loaded; bf16 under DeepSpeed with bf16"),
        Row(
            "parameters, frozen", frozen // share, "always", "vision tower, VQ, text head, and all but adapters (LoRA)"
        ),
        Row("optimizer", optimizer, "always", how),
        Row("reference model", reference // share, "always", "a second copy of the whole model; none with LoRA"),
    ]


def _rollout(model: nn.Module, run: Run) -> list[Row]:
    shape = Shape.of(model.config)
    layer = layer_of(model, shape, run)
    pictures = min(run.sampled, DECODE_BATCH) * shape.side**2 * shape.channels * layer.stream * DECODER_ALIVE
    whole = sum(p.numel() for p in model.parameters()) * layer.stream if run.zero == 3 else 0
    when = "always" if run.graphs else "rollout"
    rows = f"{run.sampled} images{' x 2 (guidance)' if run.guided else ''}"
    return [
        Row("rollout: cache", cache(model, run), when, f"keys and values, {rows}"),
        Row("rollout: joined weights", joined(model, run), when, "copies of layers that read the same"),
        Row("rollout: VQ decoder", pictures, "rollout", f"{DECODER_ALIVE} tensors at full size, {DECODE_BATCH} images"),
        Row("rollout: gathered weights", whole, "rollout", "ZeRO-3 gathers the whole model to sample"),
    ]


def _update(model: nn.Module, run: Run) -> list[Row]:
    shape = Shape.of(model.config)
    layer = layer_of(model, shape, run)
    if run.zero:
        gradients = sum(p.numel() for p in model.parameters() if p.requires_grad) * layer.stream // run.gpus
    else:
        gradients = size_of(reached(model))
    buckets = gradients if run.gpus > 1 and not run.zero else 0
    kept, lost = activations(model, run, False), activations(model, run, True)
    live = min(ZERO3_LIVE, sum(p.numel() for p in _language_model(model).parameters())) * layer.stream
    return [
        Row("update: gradients", gradients, "update", "in the dtype of the weight; split over the devices by ZeRO"),
        Row("DDP buckets", buckets, "always", "DistributedDataParallel keeps a copy of all gradients"),
        Row("update: activations", kept, "shown" if run.checkpointing else "update", "without checkpointing"),
        Row("update: activations, checkpointed", lost, "update" if run.checkpointing else "shown", "inputs of layers"),
        Row(
            "update: logits tile", logits_tile(model, run), "update", f"at most {CHUNK} positions x {shape.codes} codes"
        ),
        Row("update: weights cast", _cast(model, layer, run), "update", "autocast's bf16 copies of fp32 weights"),
        Row("update: gathered weights", live if run.zero == 3 else 0, "update", "ZeRO-3, at most 1e9 parameters"),
    ]


def _cast(model: nn.Module, layer: Layer, run: Run) -> int:
    """Bytes of the half-precision copies of fp32 linear weights, which autocast keeps while gradients may need them."""
    if layer.stream == layer.compute:
        return 0
    layers = _language_model(model).layers
    weights = sum(p.numel() for name, p in layers.named_parameters() if "_proj" in name and "lora_" not in name)
    # Frozen weights are cast again in each recomputation; trained ones are cached for the whole pass.
    return layer.compute * weights // (len(layers) if run.checkpointing and not layer.full else 1)


def total(rows: Sequence[Row]) -> int:
    """Bytes a device at the larger of the two peaks, rollout and update; rows of unknown size count as nothing."""
    held, rollout, update = (
        sum(row.size or 0 for row in rows if row.when == when) for when in ("always", "rollout", "update")
    )
    return held + max(rollout, update)


def table(columns: Mapping[str, Sequence[Row]]) -> str:
    """Markdown in GiB, a column a run; of a single run also how each row comes about.

    Brackets mark what is no part of the total; rows of 0 everywhere are left out. Raises ValueError without a run.
    """
    if not columns:
        raise ValueError("there is no run to show; give at least one recipe")
    names = list(dict.fromkeys(row.name for rows in columns.values() for row in rows))
    found = {run: {row.name: row for row in rows} for run, rows in columns.items()}
    single = next(iter(found.values())) if len(columns) == 1 else None
    lines = [_line(["GiB a device", *columns, *(["how"] if single else [])])]
    lines.append("|" + "---|" * (1 + len(columns) + bool(single)))
    for name in names:
        cells = [found[run].get(name) for run in columns]
        if all(cell is None or cell.size == 0 for cell in cells):
            continue
        lines.append(_line([name, *map(_cell, cells), *([single[name].how] if single else [])]))
    sums = [f"**{total(rows) / GIB:.2f}**" for rows in columns.values()]
    lines.append(_line(["**total**", *sums, *(["held always + the larger of rollout and update"] if single else [])]))
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None or row.size == 0:
        return "-"
    if row.size is None:
        return "not counted"
    size = f"{row.size / GIB:.2f}" if row.size >= GIB / 200 else f"{row.size / GIB:.2g}"
    return f"({size})" if row.when == "shown" else size


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
