"""What is stated about a trained teacher and its arbiter, measured on scenes that no training picture shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from numpy.typing import NDArray
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from teefusion.scoring import ClipScorer
from teefusion.shapes.arbiter import pairwise_accuracy
from teefusion.shapes.autoencoder import encode, reconstruct
from teefusion.shapes.corpus import Pool, make_pool
from teefusion.shapes.drawings import Scene

_DRAWINGS_PER_SCENE = 4
_DRAWING_SEED = 12345  # not a training pool's
_BATCH = 32
_SAMPLING_STEPS = 20
_STOCK_LENGTH = 256  # max_sequence_length of StableDiffusion3Pipeline, unless told otherwise


def measure_autoencoder(autoencoder: AutoencoderKL, pool: Pool) -> dict[str, float]:
    """Peak signal-to-noise ratio of reconstructions, in dB, and how smooth latents are (``fine_energy``)."""
    pictures = pool.pictures(torch.arange(len(pool.scenes)))
    error = (reconstruct(autoencoder, pictures) - pictures).square().mean()
    return {
        "psnr_db": float(10 * torch.log10(4 / error)),  # pictures span -1..1, so their peak is 2
        "fine_energy": fine_energy(encode(autoencoder, pictures, torch.Generator().manual_seed(0))),
    }


def fine_energy(latents_BCHW: Tensor) -> float:
    """Share of the variance in waves shorter than four latents, over all channels; white noise of 16 x 16 has 0.68."""
    centred = latents_BCHW - latents_BCHW.mean(dim=(0, 2, 3), keepdim=True)
    energy_HW = torch.fft.fft2(centred).abs().square().mean(dim=(0, 1))
    height, width = (torch.fft.fftfreq(size).abs() for size in energy_HW.shape)
    fine = torch.maximum(height[:, None], width[None, :]) > 0.25  # waves of a latent
    return float(energy_HW[fine].sum() / energy_HW.sum())


def measure_arbiter(
    arbiter: CLIPModel, tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL, pool: Pool
) -> dict[str, Any]:
    """Share of pictures whose caption beats a wrong one, for pictures as drawn and through the autoencoder."""
    pictures, scenes = pool.pictures(torch.arange(len(pool.scenes))), list(pool.scenes)
    return {
        "pictures": len(scenes),
        "drawn": pairwise_accuracy(arbiter, tokenizer, pictures, scenes, 1),
        "reconstructed": pairwise_accuracy(arbiter, tokenizer, reconstruct(autoencoder, pictures), scenes, 1),
    }


def heldout_pool(heldout: list[Scene]) -> Pool:
    """New drawings of held-out scenes."""
    return make_pool(heldout, _DRAWINGS_PER_SCENE * len(heldout), seed=_DRAWING_SEED)


def measure_guidance(teacher: StableDiffusion3Pipeline, scorer_folder: Path, captions: list[str]) -> dict[str, Any]:
    """The arbiter's scores at guidance scale s = 1 and 4, and at 4 with the stock number of empty tokens.

    Prompts and noise are the same for all three, so their differences are paired.
    """
    scorer = ClipScorer(scorer_folder)
    s1 = score_samples(teacher, scorer, captions, guidance_scale=1.0)
    s4 = score_samples(teacher, scorer, captions, guidance_scale=4.0)
    stock = score_samples(teacher, scorer, captions, guidance_scale=4.0, max_sequence_length=_STOCK_LENGTH)
    return {
        "prompts": len(captions),
        "num_inference_steps": _SAMPLING_STEPS,
        "s1": _mean(s1),
        "s4": _mean(s4),
        "s4_minus_s1": _mean(s4 - s1),
        f"s4_length_{_STOCK_LENGTH}": _mean(stock),
        f"s4_length_{_STOCK_LENGTH}_minus_s4": _mean(stock - s4),
    }


def score_samples(
    teacher: StableDiffusion3Pipeline,
    scorer: ClipScorer,
    captions: list[str],
    *,
    guidance_scale: float,
    max_sequence_length: int = 0,
    num_inference_steps: int = _SAMPLING_STEPS,
) -> NDArray[np.float64]:
    """The score of one generated picture a caption; caption k starts from noise of seed k."""
    scores: list[float] = []
    for start in range(0, len(captions), _BATCH):
        batch = captions[start : start + _BATCH]
        images = teacher(
            batch,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=[torch.Generator().manual_seed(start + k) for k in range(len(batch))],
            max_sequence_length=max_sequence_length,
        ).images
        scores += scorer.score(images, batch)
    return np.array(scores)


def _mean(values: NDArray[np.float64]) -> dict[str, float | None]:
    error = float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return {"mean": float(values.mean()), "standard_error": error}
