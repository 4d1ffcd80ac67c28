"""Which diffusers transformers can be fused, and how each is called.

A family is a transformer whose conditioning vector carries pooled text, so that guidance has a place to enter. One
entry here and one preset make a new family member known to every stage.

Axes: B = pictures, T = text tokens, E = token width, P = pooled width, C, H, W = latent channels and size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from teefusion.errors import TeacherError


class TextEmbeddings(NamedTuple):
    """Encoded prompts: what attention sees (tokens) and what the conditioning vector sees (pooled)."""

    tokens_BTE: Tensor
    pooled_BP: Tensor

    def select(self, index_B: Tensor) -> TextEmbeddings:
        """The rows ``index_B``, which may repeat."""
        return TextEmbeddings(self.tokens_BTE[index_B], self.pooled_BP[index_B])


@dataclass(frozen=True)
class SD3Family:
    """Stable Diffusion 3 and 3.5: pooled CLIP text is added to the time embedding."""

    name: str = "sd3"
    pipeline_class: str = "StableDiffusion3Pipeline"
    transformer_class: str = "SD3Transformer2DModel"

    def encode(self, pipeline: Any, prompts: list[str], *, max_sequence_length: int, device: str) -> TextEmbeddings:
        """Tokens [B, T, E] and pooled [B, P] of prompts, by the pipeline's own encoders."""
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
        """Predicted velocity [B, C, H, W], float32. ``timestep`` is a scalar or [B], in 0..1000.

        ``pooled_BP`` is the pooled text of a stock transformer, or ``fusion.pack(...)`` for a fused one.
        """
        dtype = tokens_BTE.dtype
        velocity_BCHW = transformer(
            hidden_states=x_BCHW.to(dtype),
            timestep=timestep.expand(x_BCHW.shape[0]),
            encoder_hidden_states=tokens_BTE,
            pooled_projections=pooled_BP,
            return_dict=False,
        )[0]
        return velocity_BCHW.float()  # type: ignore[no-any-return]

    def latent_shape(self, pipeline: Any, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(C, H, W) of a picture's latents; none is the model's own size in pixels."""
        factor = int(pipeline.vae_scale_factor)
        default = int(pipeline.transformer.config.sample_size) * factor
        shape = (
            int(pipeline.transformer.config.in_channels),
            (height or default) // factor,
            (width or default) // factor,
        )
        patch = int(pipeline.transformer.config.patch_size)
        if shape[1] % patch or shape[2] % patch:
            raise TeacherError(f"teacher.height and teacher.width must be multiples of {factor * patch} pixels.")
        return shape


FAMILIES = {family.transformer_class: family for family in (SD3Family(),)}


def family_of(transformer_class: str) -> SD3Family:
    """The family of a transformer class name. Raises TeacherError naming what can be fused."""
    try:
        return FAMILIES[transformer_class]
    except KeyError:
        raise TeacherError(
            f"{transformer_class} cannot be fused: its conditioning vector is not known to carry pooled text, into "
            f"which guidance could be fused. Supported: {', '.join(sorted(FAMILIES))}."
        ) from None
