"""Means of scores: by style, and as the HPS v2 benchmark reports them, over groups of 80 prompts. Pure.

Published with HPS v2 (arXiv 2306.09341; tgxs002/HPSv2): four styles of 800 prompts, ten groups each; a style's number
is the mean of its groups' means, with the standard deviation between them; the average is the mean over all prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, pstdev, stdev
from typing import Any

GROUP_SIZE = 80
OVERALL = "overall"
"""Stands beside the styles, for all prompts together."""


@dataclass(frozen=True)
class Mean:
    """Over prompts."""

    mean: float
    standard_error: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        """Of at least one value; the error of a single one is 0."""
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return cls(fmean(values), error, len(values))


def by_style(values: Sequence[float], styles: Sequence[str]) -> dict[str, list[float]]:
    """Values of each style, in the order they stand in."""
    names = sorted(set(styles))
    return {name: [value for value, style in zip(values, styles, strict=True) if style == name] for name in names}


def style_means(values: Sequence[float], styles: Sequence[str]) -> dict[str, Mean]:
    """``overall``, then each style."""
    return {name: Mean.of(group) for name, group in ({OVERALL: list(values)} | by_style(values, styles)).items()}


@dataclass(frozen=True)
class StyleMean:
    """Of one style."""

    mean: float
    """Of the groups' means."""
    deviation: float | None
    """Population standard deviation of the groups' means; none of a single group."""
    groups: int


@dataclass(frozen=True)
class BenchmarkScore:
    """Of one scorer and one row of pictures."""

    styles: Mapping[str, StyleMean]
    average: float
    """Over all prompts."""
    group_size: int = GROUP_SIZE

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; ``from_dict`` reads it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BenchmarkScore:
        """What ``to_dict`` wrote."""
        styles = {style: StyleMean(**value) for style, value in values["styles"].items()}
        return cls(styles, values["average"], values["group_size"])


def benchmark_score(scores: Mapping[str, Sequence[float]], *, group_size: int = GROUP_SIZE) -> BenchmarkScore | None:
    """From the scores of each style, in the order of its prompts.

    None where the protocol does not apply: there is no style, or one that is no whole number of groups. A score that
    is not finite makes its style's and the average's numbers not finite. Raises ValueError for a group size below 1.
    """
    if group_size < 1:
        raise ValueError(f"group_size is {group_size}: a group has at least one prompt")
    if not scores or any(not values or len(values) % group_size for values in scores.values()):
        return None
    styles = {style: _style_mean(values, group_size) for style, values in scores.items()}
    return BenchmarkScore(styles, fmean(score for values in scores.values() for score in values), group_size)


def _style_mean(values: Sequence[float], group_size: int) -> StyleMean:
    means = [fmean(values[start : start + group_size]) for start in range(0, len(values), group_size)]
    return StyleMean(fmean(means), pstdev(means) if len(means) > 1 else None, len(means))
