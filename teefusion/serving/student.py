"""A student that is ready to draw, and who takes its place when its alias moves."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.logging import disable_progress_bar
from PIL.Image import Image

from teefusion.devices import resolve_device
from teefusion.errors import RegistryError, StudentError
from teefusion.registry import TrustedModel, resolve, version_of
from teefusion.serving.api import GenerationRequest, ModelCard, request_type
from teefusion.serving.batches import AbandonedError, Picture
from teefusion.serving.metrics import Metrics
from teefusion.settings import ServeSettings, Settings
from teefusion.students import load_student

log = logging.getLogger(__name__)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 60.0, 3600.0


@dataclass(frozen=True, eq=False)
class ServedStudent:
    """A loaded student, with what requests may ask of it."""

    pipeline: Any
    card: ModelCard
    request_type: type[GenerationRequest]
    version: str | None

    @torch.inference_mode()
    def draw(self, pictures: Sequence[Picture], wanted: Callable[[], bool] = lambda: True) -> list[Image]:
        """See ``Artist``. The noise of a picture is its seed's alone, as in ``teefusion generate``."""

        def ask(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if not wanted():
                raise AbandonedError
            return {}

        width, height = pictures[0].size
        images: list[Image] = self.pipeline(
            [picture.prompt for picture in pictures],
            guidance_scale=[picture.guidance_scale for picture in pictures],
            num_inference_steps=pictures[0].num_steps,
            width=width,
            height=height,
            generator=[torch.Generator().manual_seed(picture.seed) for picture in pictures],
            callback_on_step_end=ask,
            callback_on_step_end_tensor_inputs=[],
        ).images
        return images


def load_served(uri: str, settings: Settings) -> ServedStudent:
    """Resolve, load, and draw a picture of each size.

    Raises StudentError, RegistryError, TrackingError, StorageError.
    """
    trusted, options = resolve(uri, settings), settings.serve
    disable_progress_bar()  # of loading, in a log
    device = resolve_device(settings.device)
    # Loaded in float32, as the libraries set torch's default dtype while they load in another one, for all threads:
    # pictures that the old student draws meanwhile would be others.
    pipeline = load_student(trusted.folder).to(device, _dtype(options, device))
    own = pipeline.default_sample_size * pipeline.vae_scale_factor
    card = _card(uri, trusted, pipeline, options, sizes=list(options.sizes) or [f"{own}x{own}"])
    student = ServedStudent(pipeline, card, request_type(options, card.sizes), trusted.version)
    for size in card.sizes:
        started = time.monotonic()
        try:
            student.draw([Picture(student, "", options.guidance_scale, 0, card.num_inference_steps, pixels(size))])
        except Exception as error:  # whatever it is, this student cannot be served so
            raise StudentError(f"{card.id} cannot draw {size}: {error}. Set serve.sizes to what it can.") from error
        log.info("warm-up: %s in %.2f s", size, time.monotonic() - started)
    return student


def _dtype(options: ServeSettings, device: str) -> torch.dtype:
    if options.dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    dtype: torch.dtype = getattr(torch, options.dtype)
    return dtype


def _card(uri: str, trusted: TrustedModel, pipeline: Any, options: ServeSettings, *, sizes: list[str]) -> ModelCard:
    config = pipeline.config
    name = "/".join(trusted.folder.parts[-2:]) if Path(uri).is_dir() else uri
    return ModelCard(
        id=f"{trusted.name}/{trusted.version}" if trusted.name else name,
        created=int(time.time()),
        digest=trusted.digest,
        guidance_range=tuple(config.guidance_range) if config.guidance_range else None,
        guidance_scale=options.guidance_scale,
        max_guidance_scale=options.max_guidance_scale,
        num_inference_steps=len(config.sigmas) if config.sigmas else options.num_steps,
        sizes=sizes,
        fusion=config.fusion["variant"],
    )


def pixels(size: str) -> tuple[int, int]:
    """Width and height of ``640x480``."""
    width, _, height = size.partition("x")
    return int(width), int(height)


class Post:
    """The student that is served. ``hold`` loads it, and from then on follows its alias, if ``uri`` has one."""

    def __init__(self, uri: str, settings: Settings, metrics: Metrics) -> None:
        self._uri, self._settings, self._metrics = uri, settings, metrics
        self._said = ""
        self._failed: str | None = None
        self._pause_s = self._retry_at = 0.0
        self.current: ServedStudent | None = None

    async def hold(self) -> None:
        """Load and follow, until cancelled. Raises as ``load_served`` for the first student, and for no other."""
        await self._take_up()
        while "@" in self._uri:
            await asyncio.sleep(self._settings.serve.follow_s)
            await self.look()

    async def look(self) -> None:
        """See where the alias points. A version that cannot be served changes nothing, and is said once."""
        try:
            version = await asyncio.to_thread(version_of, self._uri, self._settings)
        except RegistryError as error:
            self._refuse(error)
            return
        except Exception as error:  # whatever the registry does, what is loaded can be served
            self._metrics.unreachable.inc()
            self._say(f"Cannot see where {self._uri} points, so nothing changes: {error}")
            return
        if self.current is not None and version == self.current.version:
            self._metrics.refused.set(0)
            self._say("")
        elif version != self._failed or time.monotonic() >= self._retry_at:
            await self._swap(version)

    async def _swap(self, version: str | None) -> None:
        """Take up a version. One that cannot be loaded is tried again after pauses that grow: it may be mended."""
        try:
            await self._take_up()
        except Exception as error:  # whatever is wrong with the new one, the old one goes on
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S) if version == self._failed else _FIRST_PAUSE_S
            self._failed, self._retry_at = version, time.monotonic() + self._pause_s
            self._refuse(error)
            return
        self._failed = None
        self._metrics.swaps.inc()
        self._metrics.refused.set(0)
        self._say("")

    async def _take_up(self) -> None:
        student = await asyncio.to_thread(load_served, self._uri, self._settings)
        self.current = student
        self._metrics.serving(student.card.id, student.version, student.card.digest)
        log.info("serving %s", student.card.id)

    def _refuse(self, error: Exception) -> None:
        self._metrics.refused.set(1)
        kept = self.current.card.id if self.current else "nothing"
        self._say(f"{self._uri} cannot be followed, {kept} is served on: {error}")

    def _say(self, text: str) -> None:
        """A warning, once; no text is that all is well again."""
        if text and text != self._said:
            log.warning("%s", text)
        self._said = text
