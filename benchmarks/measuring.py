"""What several programs of this folder share: clocks, spreads, and settings from the command line."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
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


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest over the rounds."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def setting(text: str) -> tuple[str, Any]:
    """A setting by its dotted name, as in ``train.zero_stage=2``."""
    import yaml

    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)
