"""The gate's paired intervals, as it uses them. Expected values are worked out by hand."""

from __future__ import annotations

import math
import tracemalloc

import pytest

from teefusion.gate import OVERALL, decide
from teefusion.settings import GateSettings
from tests.evidence import RULES, evidence


def test_two_prompts_give_the_interval_worked_out_by_hand() -> None:
    # Differences 0 and 1: resampled means are 0, 0.5, 1 with chances 1/4, 1/2, 1/4, so 95 % reach from 0 to 1.
    interval = decide(evidence([20.0, 20.0], [20.0, 21.0]), RULES).intervals[OVERALL]
    assert (interval.difference, interval.low, interval.high) == (0.5, 0.0, 1.0)


def test_the_interval_is_as_wide_as_the_normal_one_for_many_prompts() -> None:
    # Differences of -1 and +1 in turn: standard error 1 / sqrt(400) = 0.05, so 95 % is 1.96 * 0.05 = 0.098 each side.
    teacher = [20.0] * 400
    student = [19.0, 21.0] * 200
    interval = decide(evidence(teacher, student), RULES.model_copy(update={"resamples": 10_000})).intervals[OVERALL]
    assert interval.low == pytest.approx(-0.098, abs=0.006)
    assert interval.high == pytest.approx(0.098, abs=0.006)


def test_more_confidence_makes_the_interval_wider() -> None:
    compared = evidence([20.0] * 100, [19.0, 21.0] * 50)
    wide = decide(compared, RULES.model_copy(update={"confidence": 0.99})).intervals[OVERALL]
    narrow = decide(compared, RULES.model_copy(update={"confidence": 0.8})).intervals[OVERALL]
    assert wide.low < narrow.low < narrow.high < wide.high


def test_the_comparison_is_paired_so_that_hard_prompts_add_no_noise() -> None:
    # Scores spread over 70 points, the difference is 0.5 everywhere: unpaired resampling would reject it.
    teacher = [10.0 * k for k in range(1, 9)]
    interval = decide(evidence(teacher, [score + 0.5 for score in teacher]), RULES).intervals[OVERALL]
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_pairs_follow_the_prompt_not_the_position() -> None:
    teacher = [float(2**k) for k in range(8)]
    turned = evidence(
        teacher,
        list(reversed(teacher)),
        student_prompts=tuple(f"prompt {k}" for k in reversed(range(8))),
    )
    assert decide(turned, RULES) == decide(evidence(teacher), RULES)


def test_the_seed_decides_the_resamples() -> None:
    compared = evidence([20.0] * 30, [20.0 + math.sin(k) for k in range(30)])
    assert decide(compared, RULES) == decide(compared, RULES)
    assert decide(compared, RULES) != decide(compared, RULES.model_copy(update={"seed": 1}))


def test_the_whole_benchmark_at_full_resamples_stays_within_64_mb() -> None:
    compared = evidence([20.0 + math.sin(k) for k in range(3200)])
    tracemalloc.start()
    try:
        decide(compared, GateSettings(resamples=10_000))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 64 * 2**20
