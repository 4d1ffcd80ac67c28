"""A user's captioned pictures as latents: states to learn on that are noised data, not the teacher's own.

    <folder>/metadata.jsonl    one {"file_name": ..., "prompt": ...} a line; a prompts.source too
    <folder>/...               the pictures

Axes: B = pictures, C, H, W = latent channels and size.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from teefusion.errors import PromptError
from teefusion.prompts import Prompt

METADATA = "metadata.jsonl"


class CaptionedPictures:
    """Pictures by prompt. Raises PromptError for a folder that cannot be read."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, str] = {}
        path = folder / METADATA
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PromptError(
                f"{path} cannot be read: {error}. targets.images needs it beside the pictures."
            ) from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                self._files[Prompt(entry["prompt"].strip()).digest] = entry["file_name"]
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise PromptError(
                    f'{path}, line {number}: needs {{"file_name": ..., "prompt": ...}}, not {line[:80]!r}.'
                ) from error

    def require(self, prompts: Sequence[Prompt]) -> None:
        """Raises PromptError if a prompt has no picture."""
        missing = [prompt.text for prompt in prompts if prompt.digest not in self._files]
        if missing:
            raise PromptError(
                f"{len(missing)} of {len(prompts)} prompts have no picture in {self._folder / METADATA}, "
                f"{missing[0]!r} for one. Give that file as prompts.source, or add the pictures."
            )

    @torch.no_grad()
    def latents(self, pipeline: Any, prompts: Sequence[Prompt], *, height: int, width: int) -> Tensor:
        """Latents [B, C, H, W] of the prompts' pictures, cropped and scaled to ``height`` x ``width`` pixels."""
        vae = pipeline.vae
        pixels = torch.stack([self._pixels(prompt, height, width) for prompt in prompts]).to(vae.device, vae.dtype)
        encoded = vae.encode(pixels).latent_dist.mode().float()
        latents: Tensor = (encoded - vae.config.shift_factor) * vae.config.scaling_factor
        return latents

    def _pixels(self, prompt: Prompt, height: int, width: int) -> Tensor:
        """[3, height, width] in [-1, 1]."""
        path = self._folder / self._files[prompt.digest]
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.LANCZOS)
        except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
            raise PromptError(f"{path} cannot be read as a picture: {error}. Mend it or take it out.") from error
        return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).float() / 127.5 - 1.0
