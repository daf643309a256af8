"""Trains the image tokenizer of the shapes world: transformers' ``JanusVQVAE``, from scratch, on rendered scenes.

``JanusVQVAE.forward`` passes no gradient from the reconstruction to the encoder, so the training forward is written
out here around its modules: a warm-up without quantisation, k-means for the codebook, then straight-through
quantisation. Latents and codes live on the unit sphere, because ``decode`` normalises the codes it looks up; with a
unit-norm codebook ``encode``'s Euclidean search finds the same code as the cosine search used in training.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import JanusVQVAE, JanusVQVAEConfig

logger = logging.getLogger(__name__)

COMMITMENT = 0.25  # VQ-VAE's usual weight of the commitment term
L1_WEIGHT = 1.0  # beside L2: flat colours and sharp borders
SHAPE_WEIGHT = 4.0  # extra weight of pixels off the picture's median grey: shapes cover a tenth of it
REVIVE_EVERY = 100  # steps between replacing unused codes by current latents


def tokenizer_config(image_size: int, grid: int, codes: int, hidden_size: int) -> JanusVQVAEConfig:
    """A small VQ model of Janus' own class; ``hidden_size`` is the policy's width, which its aligner and head share."""
    levels = int(np.log2(image_size // grid)) + 1
    return JanusVQVAEConfig(
        embed_dim=8,
        num_embeddings=codes,
        latent_channels=32,
        base_channels=32,  # GroupNorm(32) asks for multiples of 32
        channel_multiplier=[1] * levels,
        num_res_blocks=0,
        num_patches=grid,
        projection_dim=hidden_size,
        image_token_embed_dim=hidden_size,
        num_hidden_layers=2,
    )


def latents(model: JanusVQVAE, pixels: Tensor) -> Tensor:
    """Unit-norm continuous latents ``(batch, dim, height, width)`` of pictures in [-1, 1]."""
    return F.normalize(model.quant_conv(model.encoder(pixels)), dim=1)


def quantize(codebook: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes on the sphere: ``(ids (batch, height, width), quantised latents)``, no gradient through the ids."""
    unit = F.normalize(codebook, dim=-1)
    ids = torch.einsum("bdhw,nd->bhwn", latent.detach(), unit.detach()).argmax(-1)
    return ids, F.embedding(ids, unit).permute(0, 3, 1, 2)


def reconstruction_errors(output: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Squared and absolute error, pixels of shapes weighted up. Gradient: flows to ``output``."""
    middle = pixels.flatten(2).median(-1).values[:, :, None, None]
    weight = 1 + SHAPE_WEIGHT * ((pixels - middle).abs().amax(1, keepdim=True) > 0.3).float()
    error = output - pixels
    return (weight * error**2).mean(), (weight * error.abs()).mean()


@torch.no_grad()
def spherical_kmeans(points: Tensor, codes: int, generator: torch.Generator, rounds: int = 20) -> Tensor:
    """Codebook ``(codes, dim)`` of unit vectors; empty clusters restart from random points."""
    centres = points[torch.randperm(len(points), generator=generator)[:codes]].clone()
    for _ in range(rounds):
        nearest = (points @ centres.T).argmax(-1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = torch.bincount(nearest, minlength=codes) == 0
        sums[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
        centres = F.normalize(sums, dim=-1)
    return centres


def to_pixels(pictures: np.ndarray) -> Tensor:
    """uint8 pictures ``(batch, height, width, 3)`` to floats ``(batch, 3, height, width)`` in [-1, 1]."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_tokenizer(
    model: JanusVQVAE,
    pictures: np.ndarray,
    steps: int,
    seed: int = 0,
    batch_size: int = 32,
    learning_rate: float = 2e-3,
    warmup_share: float = 0.2,
) -> dict[str, float]:
    """Train ``model`` in place for ``steps`` on uint8 pictures; returns the last losses and the code perplexity."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    quantising = False
    codebook = model.quantize.embedding.weight
    usage = torch.zeros(len(codebook))
    stats: dict[str, float] = {}
    bar = tqdm(range(steps), desc="image tokenizer", mininterval=5)
    for step in bar:
        share = step / steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 100) * min(1.0, 2.5 * (1 - share) + 0.02)
        pixels = to_pixels(pictures[torch.randint(len(pictures), (batch_size,), generator=generator).numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            latent = latents(model, pixels)
        latent = F.normalize(latent.float(), dim=1)
        if not quantising and share > warmup_share:
            quantising = True
            _init_codebook(model, pictures, generator)
        loss = latent.new_zeros(())
        quantised = latent
        if quantising:
            ids, code = quantize(codebook, latent)
            loss = F.mse_loss(code, latent.detach()) + COMMITMENT * F.mse_loss(code.detach(), latent)
            quantised = latent + (code - latent).detach()
            usage = 0.99 * usage + torch.bincount(ids.flatten(), minlength=len(codebook)).float()
        with torch.autocast("cpu", torch.bfloat16):
            output = model.decoder(model.post_quant_conv(quantised))
        mse, edge = reconstruction_errors(output.float(), pixels)
        loss = loss + mse + L1_WEIGHT * edge
        descend(optimizer, model, loss)
        if quantising and step % REVIVE_EVERY == 0 and share < 0.8:
            _revive(codebook, usage, latent, generator)
        if step % 20 == 0:
            frequency = usage / usage.sum().clamp_min(1)
            perplexity = torch.exp(-(frequency * frequency.clamp_min(1e-9).log()).sum())
            stats = {"mse": mse.item(), "l1": edge.item(), "perplexity": perplexity.item()}
            bar.set_postfix({k: f"{v:.4g}" for k, v in stats.items()}, refresh=False)
    freeze(model)
    return stats


def descend(optimizer: torch.optim.Optimizer, model: JanusVQVAE, loss: Tensor) -> None:
    """One optimiser step on ``loss``, gradients clipped to norm 1."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def freeze(model: JanusVQVAE) -> None:
    """End of training: codes on the unit sphere, where ``decode`` looks them up, and nothing trainable."""
    codebook = model.quantize.embedding.weight
    codebook.copy_(F.normalize(codebook, dim=-1))
    model.eval().requires_grad_(False)


@torch.no_grad()
def _init_codebook(model: JanusVQVAE, pictures: np.ndarray, generator: torch.Generator) -> None:
    sample = pictures[torch.randint(len(pictures), (1024,), generator=generator).numpy()]
    points = torch.cat([latents(model, to_pixels(sample[i : i + 128])) for i in range(0, len(sample), 128)])
    points = points.permute(0, 2, 3, 1).flatten(0, 2)
    model.quantize.embedding.weight.copy_(
        spherical_kmeans(points, model.config.num_embeddings, generator).to(points.dtype)
    )


@torch.no_grad()
def _revive(codebook: Tensor, usage: Tensor, latent: Tensor, generator: torch.Generator) -> None:
    """Point codes that were hardly used at current latents, so that the whole codebook works."""
    dead = usage < 0.05
    points = latent.permute(0, 2, 3, 1).flatten(0, 2)
    codebook[dead] = points[torch.randint(len(points), (int(dead.sum()),), generator=generator)]
    usage[dead] = 1.0


@torch.no_grad()
def encode(model: JanusVQVAE, pictures: np.ndarray, batch_size: int = 256) -> Tensor:
    """Token ids ``(batch, height * width)`` of uint8 pictures, through the model's own ``encode``."""
    rows = []
    for i in range(0, len(pictures), batch_size):
        pixels = to_pixels(pictures[i : i + batch_size])
        rows.append(model.encode(pixels).image_tokens.view(len(pixels), -1))
    return torch.cat(rows)
