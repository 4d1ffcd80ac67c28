"""What is learned: the loss on the effective velocity, and the guidance residual that says how much was learned.

Pure functions of tensors. Axes: B = states in a batch, C, H, W = latent channels and size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

GUIDANCE_BUCKETS = 6


def distillation_loss(
    predicted_BCHW: Tensor, target_BCHW: Tensor, gap_B: Tensor, *, weighting: Literal["none", "guidance"], scale: float
) -> Tensor:
    """Mean squared error of the velocity, optionally weighted by the inverse guidance gap.

    The target is affine in s, so its distance from what the student already knows, ``gap = E|v_s - v_c|^2``, grows
    with ``(s - 1)^2``, and plain MSE is ruled by large scales. ``guidance`` weights each state by
    ``scale / (gap + scale)``, with ``scale`` the mean gap of the target set: near 1 where there is little guidance
    to learn, and smaller as the gap grows.
    """
    error_B = (predicted_BCHW.float() - target_BCHW).square().mean(dim=(1, 2, 3))
    if weighting == "guidance":
        error_B = error_B * (scale / (gap_B + scale))
    return error_B.mean()


@dataclass
class ResidualMeter:
    """Guidance residual ``E|v_student - v_teacher|^2 / E|v_cond - v_teacher|^2`` over held-out states.

    1 is a student that learned no guidance, 0 a perfect one. Also by equal buckets of [low, high] in s.
    """

    low: float
    high: float
    _error: Tensor = field(default_factory=lambda: torch.zeros(GUIDANCE_BUCKETS, dtype=torch.float64))
    _gap: Tensor = field(default_factory=lambda: torch.zeros(GUIDANCE_BUCKETS, dtype=torch.float64))

    def add(self, predicted_BCHW: Tensor, target_BCHW: Tensor, gap_B: Tensor, guidance_B: Tensor) -> None:
        """Count a batch."""
        error_B = (predicted_BCHW.float() - target_BCHW).square().mean(dim=(1, 2, 3))
        share_B = (guidance_B - self.low) / max(self.high - self.low, 1e-9)
        bucket_B = (share_B * GUIDANCE_BUCKETS).long().clamp(0, GUIDANCE_BUCKETS - 1).cpu()
        self._error.index_add_(0, bucket_B, error_B.double().cpu())
        self._gap.index_add_(0, bucket_B, gap_B.double().cpu())

    @property
    def overall(self) -> float:
        """Over all states; NaN when nothing was counted or there was no guidance."""
        return float(self._error.sum() / self._gap.sum()) if float(self._gap.sum()) > 0 else float("nan")

    def by_guidance(self) -> list[dict[str, float]]:
        """One entry a bucket that holds states: its range of s, and the residual in it."""
        width = (self.high - self.low) / GUIDANCE_BUCKETS
        return [
            {"low": self.low + k * width, "high": self.low + (k + 1) * width, "residual": float(error / gap)}
            for k, (error, gap) in enumerate(zip(self._error, self._gap, strict=True))
            if float(gap) > 0
        ]
