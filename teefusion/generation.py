"""Pictures from a student folder."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from teefusion.devices import resolve_device
from teefusion.files import write_bytes
from teefusion.pictures import png_bytes
from teefusion.progress import Progress
from teefusion.students import load_student

log = logging.getLogger(__name__)
_STEPS = 20


def generate(
    student: Path,
    prompts: list[str],
    *,
    guidance_scale: float,
    num_steps: int | None,
    images: int,
    seed: int,
    output: Path,
    device: str = "auto",
) -> list[Path]:
    """Write ``images`` pictures a prompt to ``output/<prompt>-<image>.png`` and return the paths.

    Without ``num_steps`` a student that was trained for a number of steps takes them, any other 20. Picture k of a
    prompt starts from noise of seed ``seed + k``. Raises StudentError, StorageError.
    """
    pipeline = load_student(student, device=resolve_device(device))
    steps = num_steps or (len(pipeline.config.sigmas) if pipeline.config.sigmas else _STEPS)
    paths = []
    with Progress("generate", total=len(prompts) * images, unit="picture") as progress:
        for p, prompt in enumerate(prompts):
            generators = [torch.Generator().manual_seed(seed + k) for k in range(images)]
            result = pipeline(
                prompt,
                guidance_scale=guidance_scale,
                num_inference_steps=steps,
                num_images_per_prompt=images,
                generator=generators,
            )
            for k, picture in enumerate(result.images):
                path = output / f"{p:03d}-{k:03d}.png"
                write_bytes(path, png_bytes(picture))
                paths.append(path)
            progress.advance(images)
    return paths
