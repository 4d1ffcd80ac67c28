"""What holds of the gate whatever it is shown."""

from __future__ import annotations

import dataclasses
import math

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from teefusion.gate import Evidence, decide
from tests.evidence import RULES, evidence

scores = st.floats(-100, 100)
thoroughly = hypothesis_settings(deadline=None, max_examples=60)


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
@thoroughly
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
@thoroughly
def test_the_order_of_prompts_does_not_matter(compared: Evidence, random: object) -> None:
    order = list(range(len(compared.styles)))
    random.shuffle(order)  # type: ignore[attr-defined]
    rows = ["styles", "teacher_prompts", "student_prompts", "teacher_scores", "student_scores"]
    rows += ["champion_prompts", "champion_scores"] if compared.champion_prompts else []
    shuffled = {row: tuple(getattr(compared, row)[k] for k in order) for row in rows}
    assert decide(dataclasses.replace(compared, **shuffled), RULES) == decide(compared, RULES)  # type: ignore[arg-type]


@given(comparisons(), st.sampled_from(["teacher_scores", "student_scores"]), st.integers(0, 23))
@thoroughly
def test_nan_anywhere_never_passes(compared: Evidence, row: str, position: int) -> None:
    values = list(getattr(compared, row))
    values[position % len(values)] = math.nan
    # 1e4 above the teacher everywhere else, so that only the NaN can fail it
    good = {"teacher_scores": [1.0] * len(values), "student_scores": [1e4] * len(values)} | {row: values}
    assert not decide(dataclasses.replace(compared, **good), RULES).passed  # type: ignore[arg-type]


@given(comparisons(), st.integers(0, 23), st.text(max_size=5))
@thoroughly
def test_other_prompts_never_pass(compared: Evidence, position: int, other: str) -> None:
    prompts = list(compared.teacher_prompts)
    prompts[position % len(prompts)] = other
    good: dict[str, object] = {"teacher_scores": [1.0] * len(prompts), "student_scores": [1e4] * len(prompts)}
    good |= {"champion_prompts": None, "champion_scores": None}
    assert decide(dataclasses.replace(compared, **good), RULES).passed  # type: ignore[arg-type]
    assert not decide(dataclasses.replace(compared, student_prompts=prompts, **good), RULES).passed  # type: ignore[arg-type]
