"""What is learned: the loss on the effective velocity, and the guidance residual that says how much was learned.

Pure functions of tensors. Axes: B = states in a batch, C, H, W = latent channels and size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

BUCKETS = 6


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


class ResidualMeter:
    """Guidance residual ``E|v_student - v_teacher|^2 / E|v_cond - v_teacher|^2`` over held-out states.

    1 is a student that learned no guidance, 0 a perfect one. Also by equal buckets of [low, high] in s, and of [0, 1]
    in sigma.
    """

    def __init__(self, low: float, high: float) -> None:
        self._guidance, self._sigma = _Buckets(low, high), _Buckets(0.0, 1.0)

    def add(
        self, predicted_BCHW: Tensor, target_BCHW: Tensor, gap_B: Tensor, guidance_B: Tensor, sigma_B: Tensor
    ) -> None:
        """Count a batch."""
        error_B = (predicted_BCHW.float() - target_BCHW).square().mean(dim=(1, 2, 3))
        self._guidance.add(guidance_B, error_B, gap_B)
        self._sigma.add(sigma_B, error_B, gap_B)

    @property
    def overall(self) -> float:
        """Over all states; NaN when nothing was counted or there was no guidance."""
        return self._guidance.overall

    def by_guidance(self) -> list[dict[str, float]]:
        """One entry a bucket that holds states: its range of s, and the residual in it."""
        return self._guidance.ratios()

    def by_sigma(self) -> list[dict[str, float]]:
        """One entry a bucket that holds states: its range of sigma, and the residual in it."""
        return self._sigma.ratios()


class _Buckets:
    """Sums of error and gap in equal buckets of [low, high]."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high
        self._error = torch.zeros(BUCKETS, dtype=torch.float64)
        self._gap = torch.zeros(BUCKETS, dtype=torch.float64)

    def add(self, where_B: Tensor, error_B: Tensor, gap_B: Tensor) -> None:
        share_B = (where_B - self._low) / max(self._high - self._low, 1e-9)
        bucket_B = (share_B * BUCKETS).long().clamp(0, BUCKETS - 1).cpu()
        self._error.index_add_(0, bucket_B, error_B.double().cpu())
        self._gap.index_add_(0, bucket_B, gap_B.double().cpu())

    @property
    def overall(self) -> float:
        return float(self._error.sum() / self._gap.sum()) if float(self._gap.sum()) > 0 else float("nan")

    def ratios(self) -> list[dict[str, float]]:
        width = (self._high - self._low) / BUCKETS
        return [
            {"low": self._low + k * width, "high": self._low + (k + 1) * width, "residual": float(error / gap)}
            for k, (error, gap) in enumerate(zip(self._error, self._gap, strict=True))
            if float(gap) > 0
        ]
