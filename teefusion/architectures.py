"""A teacher's shape from its configs alone: no weights, no text encoders, no network for the teachers with a preset.

``presets/architectures`` holds the keys of the published configs that decide a transformer's shape, under the names of
the files they are published in. The configs of other teachers are read from their folder or from the hub.

Axes: B = pictures, T = text tokens, E = token width, P = pooled width, C, H, W = latent channels and size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from teefusion.errors import TeacherError
from teefusion.families import Family, LatentShape, family_of
from teefusion.settings import TeacherSettings
from teefusion.sources import bundled_path

_TRANSFORMER, _VAE = "transformer/config.json", "vae/config.json"
_TOKENIZER = "tokenizer/tokenizer_config.json"


@dataclass(frozen=True)
class Outline:
    """What a family asks of a stock pipeline where no text is encoded and no picture decoded."""

    transformer: Any
    vae_scale_factor: int
    default_sample_size: int
    tokenizer_max_length: int
    scheduler: Any = None


@dataclass(frozen=True)
class Architecture:
    """The configs of a teacher that decide its shape."""

    family: Family
    transformer: Mapping[str, Any]
    """Of the transformer, as published."""
    vae_scale_factor: int
    """Pixels a latent, along each side."""
    clip_tokens: int
    """Tokens that CLIP pads a prompt to."""

    def outline(self, *, device: str = "meta", dtype: torch.dtype = torch.float32) -> Outline:
        """Outline with a transformer of this shape: on ``meta`` without weights, elsewhere with random ones."""
        import diffusers

        kind = getattr(diffusers, self.family.transformer_class)
        with torch.device(device):
            transformer = kind.from_config(dict(self.transformer))
        for part in transformer.children():  # the model's own `to` warns of parts that neither family has
            part.to(dtype)
        transformer.requires_grad_(False).eval()
        return Outline(
            transformer=transformer,
            vae_scale_factor=self.vae_scale_factor,
            default_sample_size=int(self.transformer.get("sample_size", _FLUX_SAMPLE_SIZE)),
            tokenizer_max_length=self.clip_tokens,
        )


# FLUX transformers have no position table and so no size in their config; diffusers' FluxPipeline writes this one down.
_FLUX_SAMPLE_SIZE = 128


@dataclass(frozen=True)
class TeacherShape:
    """What one forward of a teacher, for one picture, costs and holds."""

    parameters: int
    weights_bytes: int
    """In the teacher's dtype, with the position table."""
    forward_flops: int
    """Of the transformer: two for each multiply-add of its matrix products and convolutions."""
    latent_shape: LatentShape
    pixels: tuple[int, int]
    """Height, width."""
    text_tokens: int
    text_width: int
    pooled_width: int


def architecture(settings: TeacherSettings) -> Architecture:
    """A teacher's architecture: from this package for a preset's, else from its folder or the hub.

    Raises TeacherError if a config cannot be read, or if the transformer is of no supported family.
    """
    configs = _bundled(settings.uri)
    if configs is None:
        configs = {part: _read(settings, part) for part in (_TRANSFORMER, _VAE, _TOKENIZER)}
    try:
        transformer = configs[_TRANSFORMER]
        return Architecture(
            family=family_of(transformer["_class_name"], settings),
            transformer=transformer,
            vae_scale_factor=2 ** (len(configs[_VAE]["block_out_channels"]) - 1),
            clip_tokens=int(configs[_TOKENIZER]["model_max_length"]),
        )
    except (KeyError, TypeError) as error:
        raise TeacherError(
            f"{settings.uri} does not say its shape: {error} is missing from {_TRANSFORMER}, {_VAE} or {_TOKENIZER}. "
            "Give --teacher a preset, a diffusers folder or a hub id."
        ) from error


def teacher_shape(settings: TeacherSettings) -> TeacherShape:
    """Count a teacher's parameters and FLOPs on the meta device, where tensors have shapes and nothing is computed.

    Raises TeacherError as ``architecture``, and for a size in pixels that does not divide into patches.
    """
    shape, dtype = architecture(settings), getattr(torch, settings.dtype)
    outline = shape.outline(dtype=dtype)
    model, family = outline.transformer, shape.family
    latents = family.latent_shape(outline, settings.height, settings.width)
    tokens = family.text_tokens(outline, settings.max_sequence_length)
    width, pooled = (int(model.config[name]) for name in ("joint_attention_dim", "pooled_projection_dim"))
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        family.velocity(
            model,
            torch.empty(1, *latents),
            torch.empty(()),
            torch.empty(1, tokens, width, dtype=dtype),
            torch.empty(1, pooled, dtype=dtype),
        )
    factor = outline.vae_scale_factor
    return TeacherShape(
        parameters=sum(value.numel() for value in model.parameters()),
        weights_bytes=sum(value.nbytes for value in (*model.parameters(), *model.buffers())),
        forward_flops=counter.get_total_flops(),
        latent_shape=latents,
        pixels=(latents[1] * factor, latents[2] * factor),
        text_tokens=tokens,
        text_width=width,
        pooled_width=pooled,
    )


def bundled_architectures() -> dict[str, dict[str, Any]]:
    """The configs in this package, by the name of the preset they belong to."""
    folder = resources.files("teefusion") / "presets" / "architectures"
    files = sorted((item for item in folder.iterdir() if item.name.endswith(".json")), key=lambda item: item.name)
    return {item.name.removesuffix(".json"): json.loads(item.read_text(encoding="utf-8")) for item in files}


def _bundled(uri: str) -> dict[str, Any] | None:
    """By URI and not by name, so that a preset pointed at another checkpoint is read from there."""
    return next((configs for configs in bundled_architectures().values() if configs["uri"] == uri), None)


def _read(settings: TeacherSettings, part: str) -> Any:
    """A config of a folder or a hub id. Raises TeacherError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    folder = bundled_path(settings.uri)
    try:
        path = folder / part if folder else Path(hf_hub_download(settings.uri, part, revision=settings.revision))
        return json.loads(path.read_text(encoding="utf-8"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise TeacherError(
            f"Cannot tell the shape of {folder or settings.uri}: {part} cannot be read ({error}). Give --teacher a "
            "preset, a diffusers folder or a hub id; for a gated model set HF_TOKEN and accept its licence."
        ) from error
