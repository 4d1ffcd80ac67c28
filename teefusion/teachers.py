"""A teacher: a frozen diffusers pipeline with its family, revision and schedule.

Axes: B = pictures, T = text tokens, E = token width, P = pooled width, C, H, W = latent channels and size.
"""

from __future__ import annotations

import copy
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from teefusion.devices import resolve_device
from teefusion.errors import TeacherError
from teefusion.families import Family, TextEmbeddings, family_of
from teefusion.loading import load_models
from teefusion.settings import TeacherSettings
from teefusion.sources import bundled_path, revision_of
from teefusion.strategies import TEACHER, Grid, Weights, scheduled_grid

log = logging.getLogger(__name__)

_LOADING_ERRORS = (OSError, ValueError, KeyError, SafetensorError)
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
LORA_ADAPTER = "strategy"
"""Name of a strategy's LoRA on the teacher's transformer."""


@dataclass(frozen=True)
class Teacher:
    """Frozen models of a teacher on one device."""

    pipeline: Any
    family: Family
    settings: TeacherSettings
    device: str
    second: Any = None
    """Another transformer of the same shape, where a strategy compares with one (`teefusion.weights`)."""
    has_lora: bool = False
    """Whether the pipeline's transformer carries a strategy's LoRA."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture's latents."""
        return self.family.latent_shape(self.pipeline, self.settings.height, self.settings.width)

    def grid(self, num_steps: int) -> Grid:
        """The teacher's own schedule over ``num_steps`` steps."""
        self.family.set_timesteps(self.pipeline, num_steps, self.latent_shape)
        return scheduled_grid(self.pipeline.scheduler, self.device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbeddings:
        """Tokens [B, T, E] and pooled text [B, P] of prompts."""
        return self.family.encode(
            self.pipeline, prompts, max_sequence_length=self.settings.max_sequence_length, device=self.device
        )

    def park_text_encoders(self) -> None:
        """Take the text encoders off the device: once all text is encoded, its memory is the transformer's."""
        for name in _TEXT_ENCODERS:
            if (encoder := getattr(self.pipeline, name, None)) is not None:
                encoder.to("cpu")
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def transformer_on(self, weights: Weights) -> Any:
        """The transformer that has these weights now, and until it is asked for with others."""
        if weights.transformer == "second":
            return self.second
        if self.has_lora:
            _set_lora_scale(self.pipeline.transformer, weights.lora_scale)
        return self.pipeline.transformer

    def denoiser(self, text: TextEmbeddings, null: TextEmbeddings) -> TeacherDenoiser:
        """The teacher bound to one batch of prompts; ``null`` is the encoded empty prompt, batch 1."""
        return TeacherDenoiser(self, text, null)


class TeacherDenoiser:
    """Velocities [B, C, H, W] of a teacher for one batch of prompts, float32; see ``strategies.Denoiser``."""

    def __init__(
        self, teacher: Teacher, text: TextEmbeddings, null: TextEmbeddings, weights: Weights = TEACHER
    ) -> None:
        count = text.pooled_BP.shape[0]
        self._teacher, self._weights = teacher, weights
        self._text = text
        self._null = TextEmbeddings(*(part.expand(count, *part.shape[1:]) for part in null))
        # Joined once, as every step needs it.
        self._both = TextEmbeddings(*(torch.cat(parts) for parts in zip(self._text, self._null, strict=True)))

    def on(self, weights: Weights) -> TeacherDenoiser:
        """The same prompts on other weights."""
        if weights == self._weights:
            return self
        other = copy.copy(self)
        other._weights = weights
        return other

    def conditional(self, x_BCHW: Tensor, timestep: Tensor) -> Tensor:
        """One branch."""
        return self._velocity(x_BCHW, timestep, self._text)

    def unconditional(self, x_BCHW: Tensor, timestep: Tensor) -> Tensor:
        """One branch."""
        return self._velocity(x_BCHW, timestep, self._null)

    def both(self, x_BCHW: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Both branches of guidance, in one batch."""
        conditional, unconditional = self._velocity(torch.cat([x_BCHW, x_BCHW]), timestep, self._both).chunk(2)
        return conditional, unconditional

    @torch.no_grad()
    def _velocity(self, x_BCHW: Tensor, timestep: Tensor, text: TextEmbeddings) -> Tensor:
        transformer = self._teacher.transformer_on(self._weights)
        return self._teacher.family.velocity(transformer, x_BCHW, timestep, *text)


def _set_lora_scale(transformer: Any, scale: float) -> None:
    """How much of the LoRA the next forward sees; at 0 it is off, and costs nothing."""
    if scale == 0.0:
        transformer.disable_lora()
    else:
        transformer.enable_lora()
        transformer.set_adapters(LORA_ADAPTER, weights=scale)


def load_transformer(settings: TeacherSettings) -> tuple[Any, Family]:
    """The teacher's transformer alone, in float32 on the CPU, as a student starts: no rank holds text encoders.

    Raises what ``load_teacher`` raises.
    """
    return _load_part(settings, "transformer")


def load_vae(settings: TeacherSettings) -> Any:
    """The teacher's autoencoder alone, frozen, in float32 on the CPU. Raises what ``load_teacher`` raises."""
    vae, _ = _load_part(settings, "vae")
    return vae.to(memory_format=torch.channels_last).requires_grad_(False).eval()


def _load_part(settings: TeacherSettings, name: str) -> tuple[Any, Family]:
    source, family, options, index = _identify(settings)
    try:
        models = load_models(source, index, dtype=torch.float32, error=TeacherError, only=(name,), **options)
    except _LOADING_ERRORS as error:
        raise TeacherError(f"Cannot load the {name} of {source}: {error}") from error
    return models[name], family


def load_teacher(settings: TeacherSettings, *, device: str = "auto", **parts: Any) -> Teacher:
    """Load a teacher's pipeline, frozen, in eval mode. ``parts`` take the place of those of that name in the folder.

    Raises TeacherError if the folder or hub id cannot be loaded, is of no supported family, or is another revision
    than the settings name.
    """
    source, family, options, index = _identify(settings)
    import diffusers

    pipeline_class = getattr(diffusers, family.pipeline_class)
    dtype = getattr(torch, settings.dtype)
    # A part that the folder lists as null (SD3 without T5) has to be named, or diffusers reports it missing.
    absent = {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
    parts = {name: part for name, part in parts.items() if name in index}
    try:
        models = load_models(source, index, dtype=dtype, error=TeacherError, besides=parts, **options)
        pipeline = pipeline_class.from_pretrained(
            source, dtype=dtype, use_safetensors=True, **(options | absent | models | parts)
        )
    except _LOADING_ERRORS as error:
        raise TeacherError(f"Cannot load the teacher {source} as a {family.pipeline_class}: {error}") from error
    resolved = resolve_device(device)
    pipeline.to(resolved)
    pipeline.vae.to(memory_format=torch.channels_last)  # faster convolutions, four times so on a CPU
    pipeline.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", *_TEXT_ENCODERS):
        module = getattr(pipeline, name, None)
        if module is not None:
            module.requires_grad_(False).eval()
    log.info(
        "teacher %s (%s, revision %s) on %s", settings.name, family.name, settings.revision or "not pinned", resolved
    )
    return Teacher(pipeline, family, settings, resolved)


def _identify(settings: TeacherSettings) -> tuple[Path | str, Family, dict[str, Any], dict[str, Any]]:
    """Folder or hub id, family, options to load it with, table of parts. Raises TeacherError, for a change too."""
    folder = bundled_path(settings.uri)
    index = _model_index(folder, settings)
    family = family_of(index["transformer"][1], settings)
    found = revision_of(settings)
    if settings.revision is not None and found != settings.revision:
        raise TeacherError(
            f"Teacher {settings.uri} has changed: this run was made for revision {settings.revision}, found {found}. "
            "Start a new run, or restore the teacher."
        )
    return folder or settings.uri, family, {} if folder else {"revision": found}, index


def _model_index(folder: Path | None, settings: TeacherSettings) -> dict[str, Any]:
    """The folder's table of parts, so that an unsupported teacher is refused before its weights are loaded."""
    try:
        if folder is None:
            from diffusers import DiffusionPipeline

            index: Any = DiffusionPipeline.load_config(settings.uri, revision=settings.revision)
        else:
            index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        index["transformer"][1]
        return dict(index)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise TeacherError(
            f"{folder or settings.uri} is not a diffusers pipeline with a transformer: model_index.json cannot be read "
            f"({error}). Give --teacher a preset, a diffusers folder or a hub id."
        ) from error
