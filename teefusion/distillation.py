"""What is learned: the loss on the effective velocity, and the guidance residual that says how much was learned.

Pure functions of tensors. Axes: B = states in a batch, C, H, W = latent channels and size.
"""

from __future__ import annotations

from typing import Any, Literal

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

    1 is a student that learned no guidance, 0 a perfect one. Also by equal buckets of [low, high] in s, of [0, 1] in
    sigma, and of both.
    """

    def __init__(self, low: float, high: float) -> None:
        self._guidance, self._sigma = _Buckets(low, high), _Buckets(0.0, 1.0)
        self._both = [_Buckets(low, high) for _ in range(BUCKETS)]  # of guidance, one a bucket of sigma

    def add(
        self, predicted_BCHW: Tensor, target_BCHW: Tensor, gap_B: Tensor, guidance_B: Tensor, sigma_B: Tensor
    ) -> None:
        """Count a batch."""
        error_B = (predicted_BCHW.float() - target_BCHW).square().mean(dim=(1, 2, 3))
        error_B, gap_B, guidance_B, sigma_B = (part.double().cpu() for part in (error_B, gap_B, guidance_B, sigma_B))
        self._guidance.add(guidance_B, error_B, gap_B)
        self._sigma.add(sigma_B, error_B, gap_B)
        bucket_B = self._sigma.bucket(sigma_B)
        for k, buckets in enumerate(self._both):
            chosen_B = bucket_B == k
            buckets.add(guidance_B[chosen_B], error_B[chosen_B], gap_B[chosen_B])

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

    def by_sigma_and_guidance(self) -> list[dict[str, Any]]:
        """One entry a bucket of sigma: its range, and ``by_guidance`` in it."""
        return [
            {"low": k / BUCKETS, "high": (k + 1) / BUCKETS, "by_guidance": buckets.ratios()}
            for k, buckets in enumerate(self._both)
        ]


class _Buckets:
    """Sums of error and gap in equal buckets of [low, high]."""

    def __init__(self, low: float, high: float) -> None:
        self._low, self._high = low, high
        self._error = torch.zeros(BUCKETS, dtype=torch.float64)
        self._gap = torch.zeros(BUCKETS, dtype=torch.float64)

    def add(self, where_B: Tensor, error_B: Tensor, gap_B: Tensor) -> None:
        bucket_B = self.bucket(where_B)
        self._error.index_add_(0, bucket_B, error_B)
        self._gap.index_add_(0, bucket_B, gap_B)

    def bucket(self, where_B: Tensor) -> Tensor:
        """Which one each lies in, beyond the ends the outermost."""
        share_B = (where_B - self._low) / max(self._high - self._low, 1e-9)
        return (share_B * BUCKETS).long().clamp(0, BUCKETS - 1)

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
