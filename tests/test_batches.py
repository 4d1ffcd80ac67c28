"""Pictures that wait: which are drawn together, which are refused, and which nobody waits for any more."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from PIL import Image

from teefusion.serving.batches import AbandonedError, BatchQueue, Picture, QueueFullError
from teefusion.serving.metrics import Metrics


class Painter:
    """Paints squares of the seed's grey, and nothing while ``gate`` is shut. ``drawn`` has the seeds of each batch."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.drawn: list[list[int]] = []
        self.bad: set[int] = set()
        self.abandoned = 0

    def draw(self, pictures: Sequence[Picture], wanted: Callable[[], bool]) -> list[Image.Image]:
        self.drawn.append([picture.seed for picture in pictures])
        while not self.gate.wait(0.005):
            if not wanted():
                self.abandoned += 1
                raise AbandonedError
        if self.bad.intersection(self.drawn[-1]):
            raise RuntimeError("no more paint")
        return [Image.new("L", picture.size, picture.seed) for picture in pictures]

    def picture(self, seed: int, *, steps: int = 4, size: tuple[int, int] = (2, 2)) -> Picture:
        return Picture(self, "a", 4.0, seed, steps, size)


def with_queue(
    test: Callable[[BatchQueue, Painter, Metrics], Coroutine[Any, Any, None]], *, max_batch: int = 3, waiting: int = 8
) -> None:
    """Run ``test`` while the queue draws."""

    async def run() -> None:
        metrics = Metrics()
        queue = BatchQueue(max_batch=max_batch, max_waiting=waiting, metrics=metrics)
        drawing = asyncio.create_task(queue.run())
        try:
            await asyncio.wait_for(test(queue, Painter(), metrics), 20)
        finally:
            drawing.cancel()

    asyncio.run(run())


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_what_arrives_while_a_batch_is_drawn_is_drawn_together() -> None:
    async def test(queue: BatchQueue, painter: Painter, metrics: Metrics) -> None:
        images = queue.put([painter.picture(0)])
        await until(lambda: painter.drawn == [[0]])
        for seed in range(1, 6):
            images += queue.put([painter.picture(seed)])
        painter.gate.set()
        greys = [image.getpixel((0, 0)) for image in await asyncio.gather(*images)]
        assert painter.drawn == [[0], [1, 2, 3], [4, 5]]
        assert greys == [0, 1, 2, 3, 4, 5]
        assert b"teefusion_pictures_total 6.0" in metrics.text()

    with_queue(test)


def test_only_pictures_of_one_student_size_and_number_of_steps_are_drawn_together() -> None:
    async def test(queue: BatchQueue, painter: Painter, metrics: Metrics) -> None:
        other = Painter()
        other.gate.set()
        images = queue.put([painter.picture(0)])
        await until(lambda: painter.drawn == [[0]])
        images += queue.put([painter.picture(1), painter.picture(2, steps=5), painter.picture(3, size=(2, 4))])
        images += queue.put([other.picture(4), painter.picture(5)])
        painter.gate.set()
        await asyncio.gather(*images)
        assert painter.drawn == [[0], [1, 5], [2], [3]]
        assert other.drawn == [[4]]

    with_queue(test)


def test_a_full_queue_refuses_whole_requests_and_says_when_to_come_back() -> None:
    async def test(queue: BatchQueue, painter: Painter, metrics: Metrics) -> None:
        queue.put([painter.picture(0)])
        await until(lambda: painter.drawn == [[0]])
        queue.put([painter.picture(seed) for seed in range(1, 4)])
        with pytest.raises(QueueFullError, match="Try again in 3 s") as caught:
            queue.put([painter.picture(4), painter.picture(5)])
        assert caught.value.retry_after_s == 3  # three wait, and before anything is measured each counts a second
        assert len(queue) == 3
        queue.put([painter.picture(6)])
        assert b"teefusion_waiting_pictures 4.0" in metrics.text()
        painter.gate.set()

    with_queue(test, waiting=4)


def test_a_picture_nobody_waits_for_leaves_the_queue_at_once() -> None:
    async def test(queue: BatchQueue, painter: Painter, metrics: Metrics) -> None:
        first = queue.put([painter.picture(0)])
        await until(lambda: painter.drawn == [[0]])
        waiting = queue.put([painter.picture(1), painter.picture(2)])
        waiting[0].cancel()
        assert len(queue) == 1
        painter.gate.set()
        await asyncio.gather(*first, waiting[1])
        assert painter.drawn == [[0], [2]]
        assert b"teefusion_dropped_pictures_total 1.0" in metrics.text()

    with_queue(test)


def test_a_batch_ends_when_nobody_waits_for_any_of_it_and_not_before() -> None:
    async def test(queue: BatchQueue, painter: Painter, metrics: Metrics) -> None:
        images = queue.put([painter.picture(0), painter.picture(1)])
        await until(lambda: painter.drawn == [[0, 1]])
        images[0].cancel()
        await asyncio.sleep(0.05)
        assert painter.abandoned == 0
        images[1].cancel()
        await until(lambda: painter.abandoned == 1)
        painter.gate.set()
        (image,) = await asyncio.gather(*queue.put([painter.picture(2)]))
        assert image.getpixel((0, 0)) == 2
        assert b"teefusion_dropped_pictures_total 2.0" in metrics.text()

    with_queue(test)


def test_a_picture_that_cannot_be_drawn_fails_alone() -> None:
    async def test(queue: BatchQueue, painter: Painter, metrics: Metrics) -> None:
        painter.gate.set()
        painter.bad = {1}
        outcomes = await asyncio.gather(*queue.put([painter.picture(k) for k in range(3)]), return_exceptions=True)
        assert painter.drawn == [[0, 1, 2], [0], [1], [2]]
        assert [isinstance(outcome, Image.Image) for outcome in outcomes] == [True, False, True]
        assert str(outcomes[1]) == "no more paint"

    with_queue(test)
