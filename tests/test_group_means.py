"""The HPS benchmark's number, worked out by hand, and against numpy on any scores."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from teefusion.group_means import BenchmarkScore, StyleMean, benchmark_score


def test_means_and_deviations_are_of_groups_in_order_and_the_average_is_of_all_prompts() -> None:
    score = benchmark_score({"anime": [1, 3, 5, 7], "photo": [10, 20]}, group_size=2)
    # anime: groups of 2 and 6; photo: one group of 15; all: 46 / 6.
    assert score == BenchmarkScore(
        styles={"anime": StyleMean(4.0, 2.0, 2), "photo": StyleMean(15.0, None, 1)},
        average=pytest.approx(46 / 6),
        group_size=2,
    )


@given(st.integers(1, 4), st.lists(st.floats(-100, 100), min_size=320, max_size=320))
def test_it_is_what_the_published_protocol_computes(groups: int, values: list[float]) -> None:
    scores = values[: 80 * groups]
    score = benchmark_score({"anime": scores})
    assert score is not None
    means = np.asarray(scores).reshape(groups, 80).mean(axis=1)
    assert score.styles["anime"].mean == pytest.approx(means.mean(), abs=1e-9)
    assert (score.styles["anime"].deviation or 0) == pytest.approx(means.std(), abs=1e-6)
    assert score.average == pytest.approx(np.mean(scores), abs=1e-9)


@pytest.mark.parametrize("scores", [{}, {"anime": []}, {"anime": [1.0] * 79}, {"anime": [1.0] * 80, "photo": [1.0]}])
def test_it_is_left_out_where_a_style_is_no_whole_number_of_groups(scores: dict[str, list[float]]) -> None:
    assert benchmark_score(scores) is None


def test_a_score_that_is_no_number_shows() -> None:
    score = benchmark_score({"anime": [1.0, math.nan], "photo": [1.0, 1.0]}, group_size=2)
    assert score is not None
    assert math.isnan(score.styles["anime"].mean)
    assert math.isnan(score.average)
    assert score.styles["photo"].mean == 1


def test_a_group_has_at_least_one_prompt() -> None:
    with pytest.raises(ValueError, match="group_size is 0"):
        benchmark_score({"anime": [1.0]}, group_size=0)


def test_it_comes_back_from_json_the_same() -> None:
    score = benchmark_score({"anime": [1, 3, 5, 7], "photo": [10, 20]}, group_size=2)
    assert score is not None
    assert BenchmarkScore.from_dict(json.loads(json.dumps(score.to_dict()))) == score
