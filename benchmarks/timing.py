"""What the benchmarks measure with; no program of its own."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def synchronize(device: str) -> None:
    """Wait for a GPU; nothing to wait for on a CPU."""
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: str) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


class Clock:
    """Seconds inside a transformer's forwards. On a GPU it waits before and after each, which costs a little."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def on(self, transformer: Any, device: str) -> Iterator[Clock]:
        """Count while the block runs."""

        def enter(*_: Any) -> None:
            synchronize(device)
            self._entered = time.perf_counter()

        def leave(*_: Any) -> None:
            synchronize(device)
            self.seconds += time.perf_counter() - self._entered

        handles = [transformer.register_forward_pre_hook(enter), transformer.register_forward_hook(leave)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest over the rounds."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def rate_text(values: dict[str, float]) -> str:
    """For people: median, and least to greatest."""
    return f"{values['median']:8.3f} ({values['least']:.3f} to {values['greatest']:.3f})"
