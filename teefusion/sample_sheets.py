"""Sheets of sample pictures by the student in training: the same prompts, guidance scales and noise each time.

Text comes from the target set and the student is the engine's own, so that neither text encoders nor a second copy of
the weights is held, and at ZeRO 3 every rank takes its part. Only the process that is to show them has the decoder.

Axes: B = pictures of a prompt, one a guidance scale, C, H, W = latent channels and size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers.image_processor import VaeImageProcessor
from PIL.Image import Image
from torch import Tensor

from teefusion.families import TextEmbeddings
from teefusion.manifests import Manifest
from teefusion.onpolicy import Velocity
from teefusion.pictures import contact_sheet
from teefusion.settings import Settings
from teefusion.shards import read_tensors
from teefusion.storage import Reader
from teefusion.strategies import sub_grid
from teefusion.teachers import load_vae

_PROMPTS, _SCALES = 4, 4


class SampleSheet:
    """The first held-out prompts as rows, scales over the trained range as columns; all noise is that of seed 0.

    ``shown`` says whether this process makes pictures of what is drawn. Raises IntegrityError, TeacherError.
    """

    def __init__(self, settings: Settings, manifest: Manifest, targets: Reader, *, shown: bool) -> None:
        block = read_tensors(targets, manifest.heldout.embeddings[0])  # in the order of the prompt set
        self._text = TextEmbeddings(block["tokens"][:_PROMPTS], block["pooled"][:_PROMPTS])
        strategy = settings.strategy
        self._scales_B = torch.linspace(strategy.guidance_min, strategy.guidance_max, _SCALES)
        self._sigmas = [manifest.sigmas[k] for k in sub_grid(strategy.num_steps, settings.student_steps)]
        self._noise_CHW = torch.randn(manifest.latent_shape, generator=torch.Generator().manual_seed(0))
        self._vae = load_vae(settings.teacher) if shown else None

    def __len__(self) -> int:
        return len(self._text.pooled_BP)

    @torch.no_grad()
    def draw(self, velocity: Velocity, device: torch.device) -> Image | None:
        """The sheet of a student; none where it is not shown. Leaves torch's random state alone."""
        latents = [self._walk(velocity, k, device) for k in range(len(self))]
        if self._vae is None:
            return None
        self._vae.to(device)
        sheet = contact_sheet([self._decode(latents_BCHW) for latents_BCHW in latents])
        self._vae.to("cpu")  # its memory is training's again
        return sheet

    def _walk(self, velocity: Velocity, k: int, device: torch.device) -> Tensor:
        """Latents [B, C, H, W] of prompt k, by Euler's steps over the student's own grid."""
        s_B = self._scales_B.to(device)
        text = TextEmbeddings(*(part[k : k + 1].expand(_SCALES, *part.shape[1:]).to(device) for part in self._text))
        x_BCHW = self._noise_CHW.to(device).expand(_SCALES, *self._noise_CHW.shape)
        for sigma, following in zip(self._sigmas, self._sigmas[1:], strict=False):
            x_BCHW = x_BCHW + (following - sigma) * velocity(x_BCHW, torch.full_like(s_B, sigma), s_B, text)
        return x_BCHW

    def _decode(self, latents_BCHW: Tensor) -> Sequence[Image]:
        """One after another: at full size the decoder takes more memory than the student."""
        assert self._vae is not None
        config = self._vae.config
        scaled_BCHW = latents_BCHW / config.scaling_factor + config.shift_factor
        pixels = torch.cat([self._vae.decode(x_CHW[None], return_dict=False)[0] for x_CHW in scaled_BCHW])
        return VaeImageProcessor().postprocess(pixels, output_type="pil")  # type: ignore[no-any-return]
