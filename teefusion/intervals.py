"""Paired bootstrap: how sure the mean difference of two rows of scores is. Pure.

The interval is the percentile one, over the differences with the most extreme one counted once more: the worst for the
lower end, the best for the upper. A small sample shows too little of what is rare and bad, so that the plain interval
passes students that lose a few prompts wholly more often than it says. BCa and studentised intervals mend that too, but
their lower end may fall when a score rises; this one's cannot. ``benchmarks/gate.py`` measures how often it errs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_CHUNK_VALUES = 1 << 20  # resampled scores held at once; 3,200 prompts x 10,000 resamples would be 256 MB


@dataclass(frozen=True)
class Interval:
    """Student minus a reference over n prompts, in score points. It passes when ``low >= -margin``."""

    n: int
    reference_mean: float
    student_mean: float
    difference: float
    low: float
    high: float
    margin: float
    """Points the lower bound may be below zero: the setting's share of ``|reference_mean|``."""

    @property
    def passed(self) -> bool:
        """False for NaN."""
        return self.low >= -self.margin

    @property
    def worse(self) -> bool:
        """Whether the whole interval lies beyond the margin."""
        return self.high < -self.margin

    @property
    def precise(self) -> bool:
        """Whether a student as good as its reference would pass over these prompts."""
        return self.difference - self.low <= self.margin

    @property
    def prompts_for_precision(self) -> int:
        """About how many prompts make it precise; of a margin above zero."""
        return int(np.ceil(self.n * ((self.difference - self.low) / self.margin) ** 2))


def paired_interval(
    reference: Sequence[float], student: Sequence[float], *, share: float, confidence: float, resamples: int, seed: int
) -> Interval:
    """Interval over resampled pairs; its ends are resampled means, the outer ones where it falls between two.

    ``share`` of the reference's mean is the margin. Order matters to the last digits: a resample draws positions.
    """
    reference_N, student_N = np.asarray(reference, dtype=np.float64), np.asarray(student, dtype=np.float64)
    difference_N = student_N - reference_N
    low, high = (
        resampled_means(np.append(difference_N, extreme), resamples=resamples, seed=seed)
        for extreme in (difference_N.min(), difference_N.max())
    )
    tail = (1 - confidence) / 2
    return Interval(
        n=len(reference_N),
        reference_mean=float(reference_N.mean()),
        student_mean=float(student_N.mean()),
        difference=float(difference_N.mean()),
        low=float(np.quantile(low, tail, method="lower")),
        high=float(np.quantile(high, 1 - tail, method="higher")),
        margin=share * abs(float(reference_N.mean())),
    )


def resampled_means(values_N: NDArray[np.float64], *, resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of ``resamples`` draws of N values with replacement, in chunks that bound memory."""
    generator = np.random.default_rng(seed)
    n = len(values_N)
    chunk = max(1, _CHUNK_VALUES // n)
    means_R = np.empty(resamples)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        means_R[start : start + count] = values_N[generator.integers(n, size=(count, n))].mean(axis=1)
    return means_R
