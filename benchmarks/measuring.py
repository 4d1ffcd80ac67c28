"""What several programs of this folder share: clocks, spreads, and settings from the command line."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Clock = Callable[[], float]


def synchronize(device: Any) -> None:
    """Wait for a GPU; nothing to wait for on a CPU."""
    import torch

    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: Any, clock: Clock = time.perf_counter) -> float:
    """Seconds of one call."""
    synchronize(device)
    started = clock()
    work()
    synchronize(device)
    return clock() - started


class ForwardClock:
    """Seconds inside a transformer's forwards. On a GPU it waits before and after each, which costs a little."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def on(self, transformer: Any, device: str) -> Iterator[ForwardClock]:
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


def setting(text: str) -> tuple[str, Any]:
    """A setting by its dotted name, as in ``train.zero_stage=2``."""
    import yaml

    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)
