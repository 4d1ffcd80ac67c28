"""The gate's rules. Expected values are worked out by hand; powers of two keep them exact."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from teefusion.gate import OVERALL, Evidence, Verdict, decide
from teefusion.settings import GateSettings

RULES = GateSettings(margin=0.0125, style_margin=0.05, min_prompts=4, resamples=1000)
STYLES = ("anime", "photo")
scores = st.floats(-100, 100)


def evidence(
    teacher: Sequence[float] | None = None, student: Sequence[float] | None = None, **changes: object
) -> Evidence:
    """A student that passes RULES: eight prompts in two styles, all at 20, half the forwards, residual 0.25."""
    teacher = [20.0] * 8 if teacher is None else teacher
    student = list(teacher) if student is None else student
    prompts = tuple(f"prompt {k}" for k in range(len(teacher)))
    base = Evidence(
        styles=tuple(STYLES[k * 2 // len(teacher)] for k in range(len(teacher))),
        teacher_prompts=prompts,
        student_prompts=prompts,
        teacher_scores=tuple(teacher),
        student_scores=tuple(student),
        nfe_teacher=56.0,
        nfe_student=28.0,
        seconds_teacher=0.5,
        seconds_student=0.25,
        diversity_teacher=0.4,
        diversity_student=0.4,
        guidance_residual=0.25,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def rejected(verdict: Verdict, text: str) -> bool:
    return not verdict.passed and any(text in reason for reason in verdict.reasons)


# What passes, and what it says


def test_a_student_equal_to_its_teacher_passes_and_says_why() -> None:
    verdict = decide(evidence(), RULES)
    assert verdict.passed
    assert verdict.reasons == (
        "Overall the student scores 20 and its teacher 20 on the same 8 prompts: a difference of +0, 95 % interval "
        "+0 to +0; a lower bound of -0.25 is allowed.",
        "No style falls behind: the closest to its limit is anime, with a lower bound of +0 where -1 is allowed.",
        "It needs 28 forwards a picture where its teacher needs 56, and is 2 times as fast.",
        "Its pictures of a prompt differ 1 times as much as its teacher's; at least 0.7 is asked for.",
        "It learned to follow the guidance scale: its guidance residual is 0.25 (1 is none learned, 0 is perfect), "
        "at most 1 is allowed.",
    )


def test_intervals_give_means_difference_bounds_and_margin_in_points() -> None:
    verdict = decide(evidence(student=[20.0] * 4 + [19.5] * 4), RULES)
    photo, overall = verdict.intervals["photo"], verdict.intervals[OVERALL]
    assert (photo.n, photo.reference_mean, photo.student_mean, photo.difference) == (4, 20.0, 19.5, -0.5)
    assert (photo.low, photo.high, photo.margin) == (-0.5, -0.5, 1.0)
    assert (overall.n, overall.difference, overall.margin) == (8, -0.25, 0.25)
    assert list(verdict.intervals) == [OVERALL, "anime", "photo"]


def test_the_margin_itself_still_passes_and_a_hair_below_does_not() -> None:
    assert decide(evidence(student=[19.75] * 8), RULES).passed
    verdict = decide(evidence(student=[19.75 - 2**-10] * 8), RULES)
    assert rejected(verdict, "Overall: the student may score 0.251 below its teacher (lower bound of the 95 % interval")


def test_the_margin_is_a_share_of_the_size_of_a_negative_teacher_mean() -> None:
    assert decide(evidence([-20.0] * 8, [-20.25] * 8), RULES).passed
    assert not decide(evidence([-20.0] * 8, [-20.5] * 8), RULES).passed


def test_one_bad_style_fails_even_when_the_whole_is_good() -> None:
    verdict = decide(evidence(student=[40.0] * 4 + [18.5] * 4), RULES)
    assert not verdict.passed
    assert verdict.reasons == (
        "Style photo: the student may score 1.5 below its teacher (lower bound of the 95 % interval over 4 prompts, "
        "mean difference -1.5); 1 is allowed.",
    )


def test_a_style_may_fall_further_than_the_whole() -> None:
    student = [20.0 + 0.75] * 4 + [20.0 - 0.75] * 4  # photo: -0.75 where 1 is allowed
    assert decide(evidence(student=student), RULES).intervals["photo"].passed
    strict = RULES.model_copy(update={"style_margin": 0.025})  # 0.5 is allowed
    assert rejected(decide(evidence(student=student), strict), "Style photo")


# The interval


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


# What is no evidence


@pytest.mark.parametrize(("minimum", "passes"), [(4, True), (5, False)])
def test_a_style_needs_the_least_number_of_prompts(minimum: int, passes: bool) -> None:
    verdict = decide(evidence(), RULES.model_copy(update={"min_prompts": minimum}))
    assert verdict.passed is passes
    assert rejected(verdict, "Style anime: not enough evidence, 4 prompts where 5 are needed.") is not passes


def test_nothing_measured_never_passes() -> None:
    empty = evidence([], styles=(), teacher_prompts=(), student_prompts=())
    verdict = decide(empty, RULES)
    assert rejected(verdict, "Nothing was measured")
    assert verdict.intervals == {}


@pytest.mark.parametrize("row", ["styles", "teacher_scores", "student_prompts", "student_scores"])
def test_a_missing_entry_never_passes(row: str) -> None:
    complete = evidence()
    verdict = decide(dataclasses.replace(complete, **{row: getattr(complete, row)[:-1]}), RULES)  # type: ignore[arg-type]
    assert rejected(verdict, f"there are 8 teacher prompts, but 7 {row.replace('_', ' ')}")


def test_different_prompts_never_pass() -> None:
    other = ("another", *evidence().teacher_prompts[1:])
    verdict = decide(evidence(student_prompts=other), RULES)
    assert rejected(verdict, "different prompts: 1 only for the teacher, 1 only for the student")


def test_a_prompt_that_comes_twice_never_passes() -> None:
    twice = ("prompt 1", *evidence().teacher_prompts[1:])
    verdict = decide(evidence(teacher_prompts=twice, student_prompts=twice), RULES)
    assert rejected(verdict, "1 prompts come more than once, the first is 'prompt 1'")


def test_a_style_named_as_the_whole_never_passes() -> None:
    assert rejected(decide(evidence(styles=(OVERALL,) * 8), RULES), "Rename the style")


@pytest.mark.parametrize("row", ["teacher", "student"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_a_score_that_is_no_number_never_passes(row: str, value: float) -> None:
    values = (value, *[20.0] * 7)
    verdict = decide(evidence(**{f"{row}_scores": values}), RULES)
    assert rejected(verdict, f"1 of 8 {row} scores are no usable numbers")
    json.dumps(verdict.to_dict(), allow_nan=False)


def test_few_prompts_of_a_student_that_may_be_good_are_not_enough_evidence() -> None:
    # Differences of -4 and +4 in turn: the mean is 0, and eight prompts cannot tell 0 from the margins of 0.25 and 1.
    verdict = decide(evidence(student=[16.0, 24.0] * 4), RULES)
    assert verdict.outcome == "not enough evidence"
    assert not verdict.passed
    assert all("not enough evidence" in reason for reason in verdict.reasons)
    # Its half width is 3.25 over 9 values; (3.25 / 0.25)^2 times 8 prompts.
    overall = verdict.intervals[OVERALL]
    needed = math.ceil(8 * ((overall.difference - overall.low) / 0.25) ** 2)
    assert f"About {needed:,} prompts would tell." in verdict.reasons[0]


def test_what_is_surely_worse_or_otherwise_refused_has_failed_however_few_prompts() -> None:
    assert decide(evidence(student=[10.0] * 8), RULES).outcome == "failed"
    unsure = evidence(student=[16.0, 24.0] * 4, nfe_student=56.0)
    assert decide(unsure, RULES).outcome == "failed"
    assert decide(evidence(), RULES.model_copy(update={"min_prompts": 5})).outcome == "not enough evidence"


def test_a_precise_interval_beyond_the_margin_has_failed() -> None:
    # 400 prompts, -0.5 and +0.25 in turn: the mean is -0.125, the half width 0.04, and 0.125 is allowed.
    rules = RULES.model_copy(update={"margin": 0.00625})
    verdict = decide(evidence([20.0] * 400, [19.5, 20.25] * 200), rules)
    assert verdict.intervals[OVERALL].precise
    assert verdict.outcome == "failed"


# The champion


def with_champion(champion: Sequence[float], **changes: object) -> Evidence:
    base = evidence(**changes)  # type: ignore[arg-type]
    return dataclasses.replace(base, champion_prompts=base.teacher_prompts, champion_scores=tuple(champion))


def test_a_student_as_good_as_the_champion_passes_and_says_so() -> None:
    verdict = decide(with_champion([20.125] * 8), RULES)
    assert verdict.passed
    assert verdict.champion_intervals[OVERALL].difference == -0.125
    assert verdict.champion_intervals[OVERALL].margin == pytest.approx(0.0125 * 20.125)
    assert verdict.reasons[-1].startswith("It is not below the champion, which scores 20.12: the difference is -0.125")


def test_a_student_below_the_champion_fails_by_the_same_rule() -> None:
    verdict = decide(with_champion([20.0] * 4 + [24.0] * 4), RULES)
    assert rejected(verdict, "Style photo: the student may score 4 below the champion")
    assert rejected(verdict, "Overall: ")
    assert not any("its teacher" in reason for reason in verdict.reasons)
    assert verdict.intervals[OVERALL].passed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"champion_scores": (20.0,) * 7}, "8 teacher prompts, but 7 champion scores"),
        ({"champion_scores": None}, "but 0 champion scores"),
        ({"champion_prompts": None}, "but 0 champion prompts"),
        ({"champion_scores": (math.nan, *[20.0] * 7)}, "1 of 8 champion scores are no usable numbers"),
        ({"champion_prompts": tuple("abcdefgh")}, "Teacher and champion were scored on different prompts: 8 only"),
    ],
)
def test_a_champion_that_was_not_measured_on_the_same_prompts_never_passes(
    changes: dict[str, object], message: str
) -> None:
    verdict = decide(dataclasses.replace(with_champion([20.0] * 8), **changes), RULES)  # type: ignore[arg-type]
    assert rejected(verdict, message)
    assert verdict.outcome == "failed"


# Forwards, seconds, diversity and guidance


@pytest.mark.parametrize(("student", "passes"), [(28.0, True), (28.5, False)])
def test_exactly_half_the_forwards_pass_and_more_do_not(student: float, passes: bool) -> None:
    verdict = decide(evidence(nfe_student=student), RULES)
    assert verdict.passed is passes
    assert rejected(verdict, "28.5 forwards a picture and its teacher 56: that is 0.5089 of") is not passes


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
@pytest.mark.parametrize("row", ["nfe_teacher", "nfe_student"])
def test_forwards_that_were_not_measured_never_pass(row: str, value: float) -> None:
    assert rejected(decide(evidence(**{row: value}), RULES), "Forwards a picture were not measured")


@pytest.mark.parametrize(("student", "passes"), [(0.25, True), (0.26, False)])
def test_the_speed_asked_for_is_reached_or_not(student: float, passes: bool) -> None:
    verdict = decide(evidence(seconds_student=student), RULES.model_copy(update={"min_speedup": 2.0}))
    assert verdict.passed is passes
    assert rejected(verdict, "takes 0.26 s a picture and its teacher 0.5 s: that is 1.92 times as fast") is not passes


@pytest.mark.parametrize("row", ["seconds_teacher", "seconds_student"])
@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_seconds_that_were_not_measured_never_pass(row: str, value: float) -> None:
    assert rejected(decide(evidence(**{row: value}), RULES), "Seconds a picture were not measured")


@pytest.mark.parametrize(("student", "passes"), [(0.2, True), (0.1875, False)])
def test_diversity_may_fall_to_its_share_of_the_teachers(student: float, passes: bool) -> None:
    rules = RULES.model_copy(update={"min_diversity": 0.5})
    verdict = decide(evidence(diversity_student=student), rules)
    assert verdict.passed is passes
    assert rejected(verdict, "their distance is 0.188, the teacher's 0.4, that is 0.469 of it") is not passes


@pytest.mark.parametrize("value", [math.nan, -0.1])
@pytest.mark.parametrize("row", ["diversity_teacher", "diversity_student"])
def test_diversity_that_was_not_measured_passes_only_where_none_is_asked_for(row: str, value: float) -> None:
    assert rejected(decide(evidence(**{row: value}), RULES), "Diversity was not measured")
    assert decide(evidence(**{row: value}), RULES.model_copy(update={"min_diversity": 0.0})).passed


@pytest.mark.parametrize(("residual", "passes"), [(0.5, True), (0.5625, False)])
def test_the_residual_may_reach_its_limit_and_no_further(residual: float, passes: bool) -> None:
    verdict = decide(evidence(guidance_residual=residual), RULES.model_copy(update={"max_guidance_residual": 0.5}))
    assert verdict.passed is passes
    assert rejected(verdict, "guidance residual is 0.5625") is not passes


@pytest.mark.parametrize("residual", [math.nan, math.inf, -0.25])
def test_a_residual_that_was_not_measured_never_passes(residual: float) -> None:
    assert rejected(decide(evidence(guidance_residual=residual), RULES), "residual was not measured")


def test_all_failures_are_named_at_once() -> None:
    verdict = decide(evidence(student=[10.0] * 8, nfe_student=56.0, guidance_residual=2.0), RULES)
    starts = ("Overall", "Style anime", "Style photo", "The student needs 56", "The student learned too little")
    assert len(verdict.reasons) == len(starts)
    assert all(reason.startswith(start) for reason, start in zip(verdict.reasons, starts, strict=True))


def test_a_verdict_becomes_json() -> None:
    value = json.loads(json.dumps(decide(evidence(), RULES).to_dict(), allow_nan=False))
    assert value["passed"] is True
    assert value["outcome"] == "passed"
    assert len(value["reasons"]) == 5
    assert value["champion_intervals"] == {}
    assert value["confidence"] == 0.95
    assert value["intervals"][OVERALL] == {
        "n": 8,
        "reference_mean": 20.0,
        "student_mean": 20.0,
        "difference": 0.0,
        "low": 0.0,
        "high": 0.0,
        "margin": 0.25,
    }


# Properties


@st.composite
def comparisons(draw: st.DrawFn) -> Evidence:
    count = draw(st.integers(8, 24))
    row = st.lists(scores, min_size=count, max_size=count)
    compared = evidence(draw(row), draw(row))
    if draw(st.booleans()):
        champion = {"champion_prompts": compared.teacher_prompts, "champion_scores": tuple(draw(row))}
        compared = dataclasses.replace(compared, **champion)  # type: ignore[arg-type]
    return compared


@given(comparisons(), st.integers(0, 23), st.floats(0, 50))
@hypothesis_settings(deadline=None, max_examples=60)
def test_a_higher_student_score_never_lowers_a_bound_or_the_verdict(
    compared: Evidence, position: int, rise: float
) -> None:
    higher = list(compared.student_scores)
    higher[position % len(higher)] += rise
    before, after = decide(compared, RULES), decide(dataclasses.replace(compared, student_scores=higher), RULES)
    for kind in ("intervals", "champion_intervals"):
        found = getattr(after, kind)
        assert all(found[name].low >= interval.low for name, interval in getattr(before, kind).items())
    assert after.passed >= before.passed


@given(comparisons(), st.randoms(use_true_random=False))
@hypothesis_settings(deadline=None, max_examples=60)
def test_the_order_of_prompts_does_not_matter(compared: Evidence, random: object) -> None:
    order = list(range(len(compared.styles)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rows = ["styles", "teacher_prompts", "student_prompts", "teacher_scores", "student_scores"]
    rows += ["champion_prompts", "champion_scores"] if compared.champion_prompts else []
    shuffled = {row: tuple(getattr(compared, row)[k] for k in order) for row in rows}
    assert decide(dataclasses.replace(compared, **shuffled), RULES) == decide(compared, RULES)  # type: ignore[arg-type]


@given(comparisons(), st.sampled_from(["teacher_scores", "student_scores"]), st.integers(0, 23))
@hypothesis_settings(deadline=None, max_examples=60)
def test_nan_anywhere_never_passes(compared: Evidence, row: str, position: int) -> None:
    values = list(getattr(compared, row))
    values[position % len(values)] = math.nan
    # 1e4 above the teacher everywhere else, so that only the NaN can fail it
    good = {"teacher_scores": [1.0] * len(values), "student_scores": [1e4] * len(values)} | {row: values}
    assert not decide(dataclasses.replace(compared, **good), RULES).passed  # type: ignore[arg-type]


@given(comparisons(), st.integers(0, 23), st.text(max_size=5))
@hypothesis_settings(deadline=None, max_examples=60)
def test_other_prompts_never_pass(compared: Evidence, position: int, other: str) -> None:
    prompts = list(compared.teacher_prompts)
    prompts[position % len(prompts)] = other
    good: dict[str, object] = {"teacher_scores": [1.0] * len(prompts), "student_scores": [1e4] * len(prompts)}
    good |= {"champion_prompts": None, "champion_scores": None}
    assert decide(dataclasses.replace(compared, **good), RULES).passed  # type: ignore[arg-type]
    assert not decide(dataclasses.replace(compared, student_prompts=prompts, **good), RULES).passed  # type: ignore[arg-type]


def test_the_gate_needs_no_torch() -> None:
    code = "import sys, teefusion.gate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
