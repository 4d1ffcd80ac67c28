"""Exponential moving average of weights, or of whatever part of them a rank holds.

diffusers' EMAModel gathers whole weights under ZeRO 3; an average is elementwise, so averaging the parts is the same
and costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


class Average:
    """Averages of tensors, in float32. The first steps decay faster, ``(1 + n) / (10 + n)``, as in diffusers."""

    def __init__(self, values: Sequence[Tensor], decay: float) -> None:
        self._decay, self._steps = decay, 0
        self._averages = [value.detach().float().clone() for value in values]
        self._kept: list[Tensor] = []

    @torch.no_grad()
    def step(self, values: Sequence[Tensor]) -> None:
        """Take in the values after an optimizer step."""
        self._steps += 1
        decay = min(self._decay, self._steps / (9 + self._steps)) if self._steps > 1 else 0.0
        for average, value in zip(self._averages, values, strict=True):
            average.lerp_(value.detach().float(), 1 - decay)

    @torch.no_grad()
    def swap_in(self, values: Sequence[Tensor]) -> None:
        """Put the averages in place of the values, until ``swap_out``."""
        self._kept = [value.detach().clone() for value in values]
        for value, average in zip(values, self._averages, strict=True):
            value.data.copy_(average)

    @torch.no_grad()
    def swap_out(self, values: Sequence[Tensor]) -> None:
        """Put the values back."""
        for value, kept in zip(values, self._kept, strict=True):
            value.data.copy_(kept)
        self._kept = []

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint."""
        return {"steps": torch.tensor(self._steps)} | {str(k): value for k, value in enumerate(self._averages)}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """From a checkpoint's ``state``."""
        self._steps = int(state["steps"])
        for k, average in enumerate(self._averages):
            average.copy_(state[str(k)])
