"""Held-out states: what the guidance residual is measured on while a student trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from teefusion.distillation import ResidualMeter
from teefusion.stream import States, StateStream

BATCH = 64
Predict = Callable[[States], Tensor]
"""Velocity [B, C, H, W] at states."""


class HeldOut:
    """Held-out states with their guidance gaps, the denominator of the residual."""

    def __init__(self, stream: StateStream, device: torch.device, guidance_range: tuple[float, float]) -> None:
        self._stream, self._device, self._range = stream, device, guidance_range
        self._gaps: list[Tensor] | None = None

    @torch.no_grad()
    def measure_gaps(self, conditional: Predict | None) -> float:
        """Mean squared gap between targets and conditional velocities; kept a batch, and returned over all.

        Those stored with the targets, unless ``conditional`` says otherwise: longer steps have other velocities.
        """
        gaps = []
        for batch in self._stream.in_order(batch_size=BATCH):
            if conditional is None:
                gaps.append(batch.gap_B)
                continue
            states = batch.to(self._device)
            gaps.append((states.velocity_BCHW - conditional(states)).square().mean(dim=(1, 2, 3)).cpu())
        self._gaps = gaps
        return float(torch.cat(gaps).mean())

    @torch.no_grad()
    def residual(self, predict: Predict) -> ResidualMeter:
        """Of a student, over all held-out states. ``measure_gaps`` comes first."""
        assert self._gaps is not None, "measure_gaps comes first"
        meter = ResidualMeter(*self._range)
        for batch, gap_B in zip(self._stream.in_order(batch_size=BATCH), self._gaps, strict=True):
            states = batch.to(self._device)
            meter.add(predict(states), states.velocity_BCHW, gap_B, states.guidance_B, states.sigma_B)
        return meter
