"""Exponential moving average of weights, or of whatever part of them a rank holds.

diffusers' EMAModel gathers whole weights under ZeRO 3; an average is elementwise, so averaging the parts is the same
and costs nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


class Average:
    """Averages of tensors, in float32. The first steps decay faster, ``(1 + n) / (10 + n)``, as in diffusers."""

    def __init__(self, values: Sequence[Tensor], decay: float) -> None:
        self._decay, self.steps = decay, 0
        self._averages = [value.detach().float().clone() for value in values]

    @torch.no_grad()
    def step(self, values: Sequence[Tensor]) -> None:
        """Take in the values after an optimizer step."""
        self.steps += 1
        decay = min(self._decay, self.steps / (9 + self.steps)) if self.steps > 1 else 0.0
        for average, value in zip(self._averages, values, strict=True):
            average.lerp_(value.detach().float(), 1 - decay)

    @contextlib.contextmanager
    def in_place_of(self, values: Sequence[Tensor]) -> Iterator[None]:
        """The values are the averages, until the block ends."""
        kept = [value.detach().clone() for value in values]
        _copy(self._averages, values)
        try:
            yield
        finally:
            _copy(kept, values)

    def load(self, averages: Sequence[Tensor], steps: int) -> None:
        """Go on from averages of so many steps."""
        self.steps = steps
        _copy(averages, self._averages)


def _copy(values: Sequence[Tensor], places: Sequence[Tensor]) -> None:
    for value, place in zip(values, places, strict=True):
        place.data.copy_(value)
