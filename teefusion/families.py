"""Which diffusers transformers can be fused, and how each is called.

A family is a transformer whose conditioning vector carries pooled text, so that guidance has a place to enter. One
entry here and one preset make a new family member known to every stage.

Axes: B = pictures, T = text tokens, E = token width, P = pooled width, C, H, W = latent channels and size.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from teefusion.errors import TeacherError
from teefusion.settings import TeacherSettings

LatentShape = tuple[int, int, int]
"""(C, H, W) of one picture's latents."""


class TextEmbeddings(NamedTuple):
    """Encoded prompts: what attention sees (tokens) and what the conditioning vector sees (pooled)."""

    tokens_BTE: Tensor
    pooled_BP: Tensor

    def select(self, index_B: Tensor) -> TextEmbeddings:
        """The rows ``index_B``, which may repeat."""
        return TextEmbeddings(self.tokens_BTE[index_B], self.pooled_BP[index_B])


class Family(Protocol):
    """How the transformers of one architecture are called; ``pipeline`` is the stock diffusers pipeline."""

    @property
    def name(self) -> str:
        """As manifests have it."""
        ...

    @property
    def pipeline_class(self) -> str:
        """Of diffusers."""
        ...

    @property
    def transformer_class(self) -> str:
        """Of diffusers."""
        ...

    def encode(self, pipeline: Any, prompts: list[str], *, max_sequence_length: int, device: str) -> TextEmbeddings:
        """Tokens [B, T, E] and pooled [B, P] of prompts, by the pipeline's own encoders."""
        ...

    def velocity(
        self, transformer: Any, x_BCHW: Tensor, timestep: Tensor, tokens_BTE: Tensor, pooled_BP: Tensor
    ) -> Tensor:
        """Predicted velocity [B, C, H, W], float32. ``timestep`` is a scalar or [B], in 0..1000.

        ``pooled_BP`` is the pooled text of a stock transformer, or ``fusion.pack(...)`` for a fused one.
        """
        ...

    def latent_shape(self, pipeline: Any, height: int | None, width: int | None) -> LatentShape:
        """Of a picture of that size in pixels; none is the model's own. Raises TeacherError for a size that does not
        divide into patches.
        """
        ...

    def text_tokens(self, pipeline: Any, max_sequence_length: int) -> int:
        """T, the tokens that ``encode`` gives for a prompt."""
        ...

    def set_timesteps(self, pipeline: Any, num_steps: int, shape: LatentShape) -> None:
        """Set the pipeline's scheduler as the stock pipeline does for pictures of that shape."""
        ...

    def shift(self, pipeline: Any, shape: LatentShape) -> float:
        """The factor a of the schedule's timestep shift ``a u / (1 + (a - 1) u)`` for pictures of that shape."""
        ...

    def guidance_options(self, s: float, count: int) -> dict[str, Any]:
        """What the stock pipeline is called with to sample ``count`` prompts by classifier-free guidance at ``s``."""
        ...


def _latent_sizes(pixels: tuple[int, int], *, factor: int, patch: int) -> tuple[int, int]:
    """Latent height and width; see ``Family.latent_shape``."""
    height, width = (size // factor for size in pixels)
    if any(size % (factor * patch) for size in pixels):
        raise TeacherError(f"teacher.height and teacher.width must be multiples of {factor * patch} pixels.")
    return height, width


@dataclass(frozen=True)
class SD3Family:
    """Stable Diffusion 3 and 3.5: pooled CLIP text is added to the time embedding."""

    name: str = "sd3"
    pipeline_class: str = "StableDiffusion3Pipeline"
    transformer_class: str = "SD3Transformer2DModel"

    def encode(self, pipeline: Any, prompts: list[str], *, max_sequence_length: int, device: str) -> TextEmbeddings:
        """See Family."""
        tokens_BTE, _, pooled_BP, _ = pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=torch.device(device),
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return TextEmbeddings(tokens_BTE, pooled_BP)

    def velocity(
        self, transformer: Any, x_BCHW: Tensor, timestep: Tensor, tokens_BTE: Tensor, pooled_BP: Tensor
    ) -> Tensor:
        """See Family."""
        velocity_BCHW = transformer(
            hidden_states=x_BCHW.to(tokens_BTE.dtype),
            timestep=timestep.expand(x_BCHW.shape[0]),
            encoder_hidden_states=tokens_BTE,
            pooled_projections=pooled_BP,
            return_dict=False,
        )[0]
        return velocity_BCHW.float()  # type: ignore[no-any-return]

    def latent_shape(self, pipeline: Any, height: int | None, width: int | None) -> LatentShape:
        """See Family."""
        config, factor = pipeline.transformer.config, int(pipeline.vae_scale_factor)
        default = int(config.sample_size) * factor
        sizes = _latent_sizes((height or default, width or default), factor=factor, patch=int(config.patch_size))
        return int(config.in_channels), *sizes

    def text_tokens(self, pipeline: Any, max_sequence_length: int) -> int:
        """See Family. CLIP's tokens, then T5's; without T5 as many zeros take their place."""
        return int(pipeline.tokenizer_max_length) + max_sequence_length

    def set_timesteps(self, pipeline: Any, num_steps: int, shape: LatentShape) -> None:
        """See Family. The tail of this schedule carries the timestep shift twice, as in diffusers."""
        dynamic = pipeline.scheduler.config.get("use_dynamic_shifting")
        options = {"mu": _mu(pipeline.scheduler, self._tokens(pipeline, shape))} if dynamic else {}
        pipeline.scheduler.set_timesteps(num_steps, **options)

    def shift(self, pipeline: Any, shape: LatentShape) -> float:
        """See Family."""
        return _shift(pipeline.scheduler, self._tokens(pipeline, shape))

    def _tokens(self, pipeline: Any, shape: LatentShape) -> int:
        return int(shape[1] * shape[2] // pipeline.transformer.config.patch_size**2)

    def guidance_options(self, s: float, count: int) -> dict[str, Any]:
        """See Family."""
        return {"guidance_scale": s}


@dataclass(frozen=True)
class FluxFamily:
    """FLUX.1: pooled CLIP text is added to the time embedding, latents travel packed two by two.

    A checkpoint of the dev type has a guidance embedder of its own beside the two. It stays, and is always fed
    ``embedded_guidance``, in teacher and student alike: what the student learns is classifier-free guidance on top.
    """

    embedded_guidance: float = 1.0
    name: str = "flux"
    pipeline_class: str = "FluxPipeline"
    transformer_class: str = "FluxTransformer2DModel"

    def encode(self, pipeline: Any, prompts: list[str], *, max_sequence_length: int, device: str) -> TextEmbeddings:
        """See Family."""
        tokens_BTE, pooled_BP, _ = pipeline.encode_prompt(
            prompts, None, device=torch.device(device), max_sequence_length=max_sequence_length
        )
        return TextEmbeddings(tokens_BTE, pooled_BP)

    def velocity(
        self, transformer: Any, x_BCHW: Tensor, timestep: Tensor, tokens_BTE: Tensor, pooled_BP: Tensor
    ) -> Tensor:
        """See Family."""
        from diffusers import FluxPipeline

        count, channels, height, width = x_BCHW.shape
        dtype, device = tokens_BTE.dtype, x_BCHW.device
        guidance = torch.full([count], self.embedded_guidance, device=device) if _embeds_guidance(transformer) else None
        packed = transformer(
            hidden_states=FluxPipeline._pack_latents(x_BCHW.to(dtype), count, channels, height, width),
            timestep=timestep.expand(count) / 1000,
            guidance=guidance,
            encoder_hidden_states=tokens_BTE,
            pooled_projections=pooled_BP,
            txt_ids=torch.zeros(tokens_BTE.shape[1], 3, device=device, dtype=dtype),
            img_ids=FluxPipeline._prepare_latent_image_ids(count, height // 2, width // 2, device, dtype),
            return_dict=False,
        )[0]
        unpacked: Tensor = FluxPipeline._unpack_latents(packed, height, width, vae_scale_factor=1)
        return unpacked.float()

    def latent_shape(self, pipeline: Any, height: int | None, width: int | None) -> LatentShape:
        """See Family."""
        factor = int(pipeline.vae_scale_factor)
        default = int(pipeline.default_sample_size) * factor
        sizes = _latent_sizes((height or default, width or default), factor=factor, patch=2)
        return int(pipeline.transformer.config.in_channels) // 4, *sizes

    def text_tokens(self, pipeline: Any, max_sequence_length: int) -> int:
        """See Family. T5's alone."""
        return max_sequence_length

    def set_timesteps(self, pipeline: Any, num_steps: int, shape: LatentShape) -> None:
        """See Family."""
        even = not pipeline.scheduler.config.get("use_flow_sigmas")
        sigmas = np.linspace(1.0, 1 / num_steps, num_steps) if even else None
        mu = _mu(pipeline.scheduler, shape[1] * shape[2] // 4)
        pipeline.scheduler.set_timesteps(None if even else num_steps, sigmas=sigmas, mu=mu)

    def shift(self, pipeline: Any, shape: LatentShape) -> float:
        """See Family."""
        return _shift(pipeline.scheduler, shape[1] * shape[2] // 4)

    def guidance_options(self, s: float, count: int) -> dict[str, Any]:
        """See Family. FLUX pipelines call it true CFG, and run it where there is a negative prompt."""
        return {"guidance_scale": self.embedded_guidance, "true_cfg_scale": s, "negative_prompt": [""] * count}


def _shift(scheduler: Any, tokens: int) -> float:
    """See ``Family.shift``."""
    config = scheduler.config
    return math.exp(_mu(scheduler, tokens)) if config.get("use_dynamic_shifting") else float(config["shift"])


def _mu(scheduler: Any, tokens: int) -> float:
    """The dynamic timestep shift mu for a picture of so many tokens, as diffusers' pipelines have it."""
    from diffusers.pipelines.flux.pipeline_flux import calculate_shift

    config = scheduler.config
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    return float(calculate_shift(tokens, *(config[name] for name in names if name in config)))


def _embeds_guidance(transformer: Any) -> bool:
    config = getattr(transformer, "module", transformer).config  # under DDP the model is one level down
    return bool(config.guidance_embeds)


FAMILIES: dict[str, Family] = {family.transformer_class: family for family in (SD3Family(), FluxFamily())}


def family_of(transformer_class: str, settings: TeacherSettings) -> Family:
    """The family of a transformer class name. Raises TeacherError naming what can be fused."""
    family = FAMILIES.get(transformer_class)
    if family is None:
        raise TeacherError(
            f"{transformer_class} cannot be fused: its conditioning vector is not known to carry pooled text, into "
            f"which guidance could be fused. Supported: {', '.join(sorted(FAMILIES))}."
        )
    if isinstance(family, FluxFamily):
        return dataclasses.replace(family, embedded_guidance=settings.embedded_guidance)
    return family
