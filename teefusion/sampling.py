"""Pictures by a strategy: the teacher's whole trajectory under Z-Sampling or W2SD, which no stock pipeline walks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor

from teefusion.strategies import Strategy
from teefusion.teachers import Teacher


@torch.no_grad()
def sample(
    teacher: Teacher,
    strategy: Strategy,
    prompts: Sequence[str],
    *,
    guidance_scale: float,
    num_steps: int,
    generators: Sequence[torch.Generator],
    output_type: str = "pil",
) -> Any:
    """Pictures of the prompts, from the noise that the stock pipeline would draw from the same generators.

    ``output_type`` is as diffusers has it; ``latent`` gives latents [B, C, H, W] in float32.
    """
    pipeline = teacher.pipeline
    denoiser = teacher.denoiser(teacher.encode(list(prompts)), teacher.encode([""]))
    grid = teacher.grid(num_steps)
    shape, device = (len(prompts), *teacher.latent_shape), torch.device(teacher.device)
    x_BCHW = randn_tensor(shape, list(generators), device, pipeline.transformer.dtype).float()
    s_B = torch.full([len(prompts)], guidance_scale, device=device)
    for i in range(num_steps):
        x_BCHW = strategy.step(denoiser, grid, x_BCHW, i, s_B).x_next_BCHW
    if output_type == "latent":
        return x_BCHW
    config = pipeline.vae.config
    latents_BCHW = (x_BCHW / config.scaling_factor + config.shift_factor).to(pipeline.vae.dtype)
    pixels = pipeline.vae.decode(latents_BCHW, return_dict=False)[0]
    return pipeline.image_processor.postprocess(pixels, output_type=output_type)
