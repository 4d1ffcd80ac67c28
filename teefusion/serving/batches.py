"""Pictures that wait, and are drawn together where student, size and steps agree.

A picture is the unit: it has its own prompt, guidance scale and noise, so it looks the same whatever it is drawn with.
While one batch is drawn the next one gathers; nobody waits for company.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from PIL.Image import Image

from teefusion.serving.metrics import Metrics

log = logging.getLogger(__name__)


class AbandonedError(Exception):
    """Nobody waits for any picture of this batch."""


class QueueFullError(Exception):
    """No room for as many pictures; there may be in ``retry_after_s`` seconds."""

    def __init__(self, retry_after_s: int) -> None:
        super().__init__(f"No room for as many pictures. Try again in {retry_after_s} s.")
        self.retry_after_s = retry_after_s


class Artist(Protocol):
    """Draws pictures of one size in one number of steps."""

    def draw(self, pictures: Sequence[Picture], wanted: Callable[[], bool]) -> list[Image]:
        """One image a picture. Asks ``wanted`` between steps, and raises AbandonedError where it is no more."""
        ...


@dataclass(frozen=True)
class Picture:
    """What to draw, and who draws it."""

    artist: Artist
    prompt: str
    guidance_scale: float
    seed: int
    num_steps: int
    size: tuple[int, int]
    """Width and height in pixels."""

    @property
    def kind(self) -> Hashable:
        """What pictures that are drawn together have in common."""
        return id(self.artist), self.num_steps, self.size


@dataclass(frozen=True, eq=False)
class _Order:
    """A picture and what its client waits for, which is done where nobody does any more."""

    picture: Picture
    image: asyncio.Future[Image]


class BatchQueue:
    """At most ``max_waiting`` pictures, drawn ``max_batch`` at a time in a thread of its own, oldest first."""

    def __init__(self, *, max_batch: int, max_waiting: int, metrics: Metrics) -> None:
        self._max_batch, self._max_waiting, self._metrics = max_batch, max_waiting, metrics
        self._waiting: deque[_Order] = deque()
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="draw")
        self._seconds_a_picture = 1.0
        metrics.watch(self.__len__)

    def __len__(self) -> int:
        """Pictures that wait and that somebody waits for."""
        return sum(not order.image.done() for order in self._waiting)

    def put(self, pictures: Sequence[Picture]) -> list[asyncio.Future[Image]]:
        """Have all of them drawn. Who cancels an image takes it out. Raises QueueFullError if they do not all fit."""
        waiting = len(self)
        if waiting + len(pictures) > self._max_waiting:
            raise QueueFullError(max(1, math.ceil(waiting * self._seconds_a_picture)))
        loop = asyncio.get_running_loop()
        orders = [_Order(picture, loop.create_future()) for picture in pictures]
        self._waiting.extend(orders)
        self._arrived.set()
        return [order.image for order in orders]

    async def run(self) -> None:
        """Draw, until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._take():
                await self._draw(batch)

    def _take(self) -> list[_Order]:
        """The oldest order and the next ones of its kind; those that nobody waits for leave the queue."""
        alive = [order for order in self._waiting if not order.image.done()]
        self._metrics.dropped.inc(len(self._waiting) - len(alive))
        batch = [order for order in alive if order.picture.kind == alive[0].picture.kind][: self._max_batch]
        taken = set(batch)
        self._waiting = deque(order for order in alive if order not in taken)
        return batch

    async def _draw(self, batch: Sequence[_Order]) -> None:
        """Draw, and hand out the images; a batch that fails is drawn one by one, so that each picture fails alone."""

        def wanted() -> bool:
            return not all(order.image.done() for order in batch)

        started = time.monotonic()
        loop, pictures = asyncio.get_running_loop(), [order.picture for order in batch]
        try:
            images = await loop.run_in_executor(self._thread, pictures[0].artist.draw, pictures, wanted)
        except AbandonedError:
            self._metrics.dropped.inc(len(batch))
            return
        except Exception as error:  # whatever a model does, the next batch is to be drawn
            log.warning("%d pictures could not be drawn: %s: %s", len(batch), type(error).__name__, error)
            if len(batch) > 1:
                for order in batch:
                    await self._draw([order])
            elif wanted():
                batch[0].image.set_exception(error)
            return
        self._seconds_a_picture = (time.monotonic() - started) / len(batch)
        self._metrics.batch.observe(len(batch))
        self._metrics.pictures.inc(len(batch))
        for order, image in zip(batch, images, strict=True):
            if not order.image.done():
                order.image.set_result(image)
