"""A teacher: a frozen diffusers pipeline with its family, revision and schedule.

Axes: B = pictures, T = text tokens, E = token width, P = pooled width, C, H, W = latent channels and size.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teefusion.devices import resolve_device
from teefusion.errors import TeacherError
from teefusion.families import SD3Family, TextEmbeddings, family_of
from teefusion.settings import TeacherSettings
from teefusion.sources import bundled_path, revision_of
from teefusion.strategies import Grid, make_grid

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Teacher:
    """Frozen models of a teacher on one device."""

    pipeline: Any
    family: SD3Family
    settings: TeacherSettings
    device: str

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one picture's latents."""
        return self.family.latent_shape(self.pipeline, self.settings.height, self.settings.width)

    def grid(self, num_steps: int) -> Grid:
        """The teacher's own schedule over ``num_steps`` steps."""
        return make_grid(self.pipeline.scheduler, num_steps, self.device)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> TextEmbeddings:
        """Tokens [B, T, E] and pooled text [B, P] of prompts."""
        return self.family.encode(
            self.pipeline, prompts, max_sequence_length=self.settings.max_sequence_length, device=self.device
        )

    def denoiser(self, text: TextEmbeddings, null: TextEmbeddings) -> TeacherDenoiser:
        """The teacher bound to one batch of prompts; ``null`` is the encoded empty prompt, batch 1."""
        return TeacherDenoiser(self, text, null)


class TeacherDenoiser:
    """Velocities of a teacher for one batch of prompts; both branches of guidance share a batch."""

    def __init__(self, teacher: Teacher, text: TextEmbeddings, null: TextEmbeddings) -> None:
        self._teacher = teacher
        count = text.pooled_BP.shape[0]
        self._tokens = torch.cat([text.tokens_BTE, null.tokens_BTE.expand(count, -1, -1)])
        self._pooled = torch.cat([text.pooled_BP, null.pooled_BP.expand(count, -1)])

    @torch.no_grad()
    def both(self, x_BCHW: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional velocity [B, C, H, W], float32."""
        velocity = self._teacher.family.velocity(
            self._teacher.pipeline.transformer, torch.cat([x_BCHW, x_BCHW]), timestep, self._tokens, self._pooled
        )
        conditional, unconditional = velocity.chunk(2)
        return conditional, unconditional


def load_transformer(settings: TeacherSettings) -> tuple[Any, SD3Family]:
    """The teacher's transformer alone, in float32 on the CPU, as a student starts: no rank holds text encoders.

    Raises what ``load_teacher`` raises.
    """
    folder, family, revision, _ = _identify(settings)
    import diffusers

    transformer_class = getattr(diffusers, family.transformer_class)
    source: str | Path = folder or settings.uri
    options = {} if folder else {"revision": revision}
    try:
        transformer = transformer_class.from_pretrained(
            source, subfolder="transformer", dtype=torch.float32, use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(f"Cannot load the transformer of {source}: {error}") from error
    return transformer, family


def load_teacher(settings: TeacherSettings, *, device: str = "auto", **parts: Any) -> Teacher:
    """Load a teacher's pipeline, frozen, in eval mode. ``parts`` take the place of those in the folder.

    Raises TeacherError if the folder or hub id cannot be loaded, is of no supported family, or is another revision
    than the settings name.
    """
    folder, family, found, index = _identify(settings)
    import diffusers

    pipeline_class = getattr(diffusers, family.pipeline_class)
    source: str | Path = folder or settings.uri
    options: dict[str, Any] = {} if folder else {"revision": found}
    # A part that the folder lists as null (SD3 without T5) has to be named, or diffusers reports it missing.
    options |= {name: None for name, value in index.items() if isinstance(value, list) and value[0] is None}
    options |= parts
    try:
        pipeline = pipeline_class.from_pretrained(
            source, dtype=getattr(torch, settings.dtype), use_safetensors=True, **options
        )
    except (OSError, ValueError, KeyError) as error:
        raise TeacherError(f"Cannot load the teacher {source} as a {family.pipeline_class}: {error}") from error
    resolved = resolve_device(device)
    pipeline.to(resolved)
    pipeline.vae.to(memory_format=torch.channels_last)  # faster convolutions, four times so on a CPU
    pipeline.set_progress_bar_config(disable=True)
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        module = getattr(pipeline, name, None)
        if module is not None:
            module.requires_grad_(False).eval()
    log.info("teacher %s (%s, revision %s) on %s", settings.name, family.name, found, resolved)
    return Teacher(pipeline, family, settings, resolved)


def _identify(settings: TeacherSettings) -> tuple[Path | None, SD3Family, str, dict[str, Any]]:
    """Folder (none for a hub id), family, revision and table of parts. Raises TeacherError, for a change too."""
    folder = bundled_path(settings.uri)
    index = _model_index(folder, settings)
    family = family_of(index["transformer"][1])
    found = revision_of(settings)
    if settings.revision is not None and found != settings.revision:
        raise TeacherError(
            f"Teacher {settings.uri} has changed: this run was made for revision {settings.revision}, found {found}. "
            "Start a new run, or restore the teacher."
        )
    return folder, family, found, index


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
