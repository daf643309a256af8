"""Second stage of the image tokenizer: the code of a patch should say what is in the patch.

The normalisation layers of `JanusVQVAE` use statistics of the whole picture, so after the first stage the codes of an
empty corner change with an object drawn elsewhere, and a language model must learn all those dialects. Here the codes
of a slot encoded by itself become the standard: the decoder learns to read them, and the codes of the whole picture
are pulled towards them. Afterwards the plain ``encode`` works as before, and `encode_tiles` gives codes that depend on
their own slot alone, on which the policy is trained.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from tqdm import tqdm
from transformers import JanusVQVAE

from .renderer import SLOTS
from .train_tokenizer import COMMITMENT, L1_WEIGHT, descend, freeze, latents, quantize, reconstruction_errors, to_pixels

CONSISTENCY = 1.0  # weight of the pull of whole-picture latents towards those of their slots


def tile_latents(model: JanusVQVAE, pixels: Tensor) -> Tensor:
    """Latents ``(batch, dim, height, width)`` of pictures whose slots are encoded one by one."""
    tiles = rearrange(pixels, "batch c (row h) (column w) -> (batch row column) c h w", row=SLOTS, column=SLOTS)
    return rearrange(
        latents(model, tiles), "(batch row column) d h w -> batch d (row h) (column w)", row=SLOTS, column=SLOTS
    )


def localize_tokenizer(
    model: JanusVQVAE,
    pictures: np.ndarray,
    steps: int,
    seed: int = 0,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
) -> dict[str, float]:
    """Train ``model`` in place on uint8 pictures; returns the last errors and the share of codes that agree."""
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    codebook = model.quantize.embedding.weight
    stats: dict[str, float] = {}
    bar = tqdm(range(steps), desc="local codes", mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * min(1.0, (step + 1) / 50) * min(1.0, 2 * (1 - step / steps) + 0.02)
        pixels = to_pixels(pictures[torch.randint(len(pictures), (batch_size,), generator=generator).numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            whole, local = latents(model, pixels), tile_latents(model, pixels)
        whole, local = F.normalize(whole.float(), dim=1), F.normalize(local.float(), dim=1)
        half = batch_size // 2
        latent = torch.cat([local[:half], whole[half:]])
        _, code = quantize(codebook, latent)
        with torch.autocast("cpu", torch.bfloat16):
            output = model.decoder(model.post_quant_conv(latent + (code - latent).detach()))
        mse, edge = reconstruction_errors(output.float(), pixels)
        local_ids, local_code = quantize(codebook, local)
        loss = mse + L1_WEIGHT * edge + CONSISTENCY * F.mse_loss(whole, local_code.detach())
        loss = loss + F.mse_loss(code, latent.detach()) + COMMITMENT * F.mse_loss(code.detach(), latent)
        descend(optimizer, model, loss)
        if step % 20 == 0:
            same = (quantize(codebook, whole)[0] == local_ids).float().mean()
            stats = {"mse": mse.item(), "l1": edge.item(), "agree": same.item()}
            stats["codes"] = float(len(local_ids.unique()))
            bar.set_postfix({k: f"{v:.4g}" for k, v in stats.items()}, refresh=False)
    freeze(model)
    return stats


@torch.no_grad()
def encode_tiles(model: JanusVQVAE, pictures: np.ndarray, batch_size: int = 256) -> Tensor:
    """Token ids ``(batch, height * width)`` of uint8 pictures, each slot encoded by itself."""
    codebook = model.quantize.embedding.weight
    return torch.cat(
        [
            quantize(codebook, tile_latents(model, to_pixels(pictures[i : i + batch_size])))[0].flatten(1)
            for i in range(0, len(pictures), batch_size)
        ]
    )
