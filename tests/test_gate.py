"""The gate's rules. Expected values are worked out by hand; powers of two keep them exact."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Sequence

import pytest

from teefusion.gate import OVERALL, Evidence, decide
from tests.evidence import RULES, evidence, rejected

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


LIMITS = {
    "nfe_student": ({}, 28.0, 28.5, "28.5 forwards a picture and its teacher 56: that is 0.5089 of"),
    "seconds_student": (
        {"min_speedup": 2.0}, 0.25, 0.26, "takes 0.26 s a picture and its teacher 0.5 s: that is 1.92 times as fast",
    ),
    "diversity_student": (
        {"min_diversity": 0.5}, 0.2, 0.1875, "their distance is 0.188, the teacher's 0.4, that is 0.469 of it",
    ),
    "guidance_residual": ({"max_guidance_residual": 0.5}, 0.5, 0.5625, "guidance residual is 0.5625"),
}  # fmt: skip
"""Rules, what just passes them, what just does not, and what is said of that."""


@pytest.mark.parametrize("measured", LIMITS)
def test_a_limit_may_be_reached_and_no_further(measured: str) -> None:
    changes, good, bad, reason = LIMITS[measured]
    rules = RULES.model_copy(update=changes)
    assert decide(evidence(**{measured: good}), rules).passed
    assert rejected(decide(evidence(**{measured: bad}), rules), reason)


@pytest.mark.parametrize(
    ("rows", "values", "reason"),
    [
        (("nfe_teacher", "nfe_student"), (math.nan, math.inf, 0.0, -1.0), "Forwards a picture were not measured"),
        (("seconds_teacher", "seconds_student"), (math.nan, 0.0), "Seconds a picture were not measured"),
        (("diversity_teacher", "diversity_student"), (math.nan, -0.1), "Diversity was not measured"),
        (("guidance_residual",), (math.nan, math.inf, -0.25), "residual was not measured"),
    ],
)
def test_what_was_not_measured_never_passes(rows: Sequence[str], values: Sequence[float], reason: str) -> None:
    for row, value in itertools.product(rows, values):
        assert rejected(decide(evidence(**{row: value}), RULES), reason), (row, value)


def test_diversity_need_not_be_measured_where_none_is_asked_for() -> None:
    assert decide(evidence(diversity_student=math.nan), RULES.model_copy(update={"min_diversity": 0.0})).passed


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


def test_the_gate_needs_no_torch() -> None:
    code = "import sys, teefusion.gate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
