"""The teacher's AutoencoderKL: 64 pixels to 16 x 16 latents of 3 channels, held near the picture's thumbnail.

Left to itself, so small an autoencoder hides edges in latents that alternate from one to the next, and guidance then
sharpens those, which a student learns last (docs/method.md). That smooth latents are easier for diffusion models in
general is Skorokhodov et al.'s finding (arXiv 2502.14831); a thumbnail is smooth, and edges cost no more with it: the
reconstruction is as good as without.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor

from teefusion.progress import Progress
from teefusion.shapes.corpus import Pool
from teefusion.shapes.drawings import SIZE
from teefusion.shapes.optimisation import Optimizer

LATENT_CHANNELS = 3
_LEARNING_RATE = 2e-3
_CROP = SIZE // 2
_CROP_SHARE = 0.75
_KL_WEIGHT = 1e-5  # enough to keep latents near a unit Gaussian's scale, too little to blur
_THUMBNAIL_WEIGHT = 1.0  # leaves 0.5 % of the variance for what a thumbnail does not show


def train_autoencoder(pool: Pool, *, steps: int, batch_size: int, seed: int) -> AutoencoderKL:
    """Train on pictures of the pool, then measure scaling and shift so that latents have mean 0 and variance 1."""
    torch.manual_seed(seed)
    model = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),  # narrow at full size: decoding must stay cheap beside sampling
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).to(memory_format=torch.channels_last)  # narrow convolutions on a CPU: nine times faster than contiguous
    generator = torch.Generator().manual_seed(seed)
    optimizer = Optimizer(model.parameters(), learning_rate=_LEARNING_RATE, steps=steps)
    with Progress("autoencoder", total=steps, unit="step") as progress:
        for step in range(steps):
            index = torch.randint(len(pool.scenes), (batch_size,), generator=generator)
            pictures = pool.pictures(index)
            # Convolutions learn the same from quarter pictures, four times faster; whole ones teach the attention.
            if step < _CROP_SHARE * steps:
                pictures = _crop(pictures, generator)
            pictures = pictures.contiguous(memory_format=torch.channels_last)
            posterior = model.encode(pictures).latent_dist
            decoded = model.decode(posterior.sample(generator)).sample
            loss = _reconstruction(decoded, pictures) + _KL_WEIGHT * posterior.kl().mean()
            thumbnails = F.interpolate(pictures, size=posterior.mean.shape[-2:], mode="area")
            loss = loss + _THUMBNAIL_WEIGHT * F.mse_loss(posterior.mean, thumbnails)
            optimizer.step(loss)
            progress.advance(1, note=f"loss {loss.item():.4f}")
    model.eval().requires_grad_(False)
    latents = encode(model, pool.pictures(torch.arange(min(2048, len(pool.scenes)))), generator)
    model.register_to_config(shift_factor=float(latents.mean()), scaling_factor=1 / float(latents.std()))
    return model


def _crop(pictures_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """A quarter of each picture, from one place for the whole batch."""
    top, left = (int(k) for k in torch.randint(SIZE - _CROP + 1, (2,), generator=generator))
    return pictures_BCHW[:, :, top : top + _CROP, left : left + _CROP]


def _reconstruction(decoded: Tensor, pictures: Tensor) -> Tensor:
    """Absolute error of pixels and of their differences to the neighbours, which keeps edges sharp."""
    loss = F.l1_loss(decoded, pictures)
    for axis in (-1, -2):
        loss = loss + F.l1_loss(decoded.diff(dim=axis), pictures.diff(dim=axis))
    return loss


@torch.no_grad()
def encode(model: AutoencoderKL, pictures_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Sampled latents [B, 3, 16, 16], before shift and scaling."""
    parts = [model.encode(part).latent_dist.sample(generator) for part in pictures_BCHW.split(64)]
    return torch.cat(parts)


@torch.no_grad()
def reconstruct(model: AutoencoderKL, pictures_BCHW: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] through the autoencoder and back, in -1..1."""
    parts = [model.decode(model.encode(part).latent_dist.mode()).sample for part in pictures_BCHW.split(64)]
    return torch.cat(parts).clamp(-1, 1)
