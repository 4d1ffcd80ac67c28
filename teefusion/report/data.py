"""What a report shows, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from teefusion.gate import Verdict
from teefusion.group_means import BenchmarkScore, Mean
from teefusion.intervals import Interval

Color = Literal["unguided", "teacher", "student", "champion", "cfg", "matched"]
COLORS: tuple[Color, ...] = ("teacher", "student", "champion", "cfg", "matched", "unguided")
"""Names of the page's CSS variables, in the order in which rows without a part of their own take them."""


@dataclass(frozen=True)
class Timing:
    """Seconds a picture over the batches of one evaluation, text encoding and decoding included."""

    median: float
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True)
class Row:
    """One of what is compared."""

    title: str
    color: Color
    scores: Mapping[str, Mean] = field(default_factory=dict)
    """``overall``, then each style."""
    benchmark: BenchmarkScore | None = None
    """None where the prompts are no whole groups."""
    guidance_scale: float | None = None
    nfe: float | None = None
    """Forwards a picture."""
    seconds: Timing | None = None
    peak_bytes: int | None = None
    diversity: Mean | None = None


@dataclass(frozen=True)
class Pairing:
    """One row held against another, prompt by prompt."""

    title: str
    """Such as `student minus teacher`."""
    intervals: Mapping[str, Interval]
    """``overall``, then each style."""


@dataclass(frozen=True)
class ControlPoint:
    """A row at one guidance scale."""

    scale: float
    score: Mean
    saturation: Mean


@dataclass(frozen=True)
class ResidualBucket:
    """Guidance residual of held-out states with a guidance scale from ``low`` to ``high``."""

    low: float
    high: float
    residual: float


@dataclass(frozen=True)
class SigmaBucket:
    """Guidance residuals by s of held-out states with a sigma from ``low`` to ``high``."""

    low: float
    high: float
    by_guidance: Sequence[ResidualBucket]


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one prompt from one seed, by row, in any format that PIL reads."""

    prompt: str
    style: str
    pictures: Mapping[str, bytes]


@dataclass(frozen=True)
class SweptPictures:
    """Pictures of one prompt from one seed, by row and guidance scale."""

    prompt: str
    style: str
    pictures: Mapping[str, Mapping[float, bytes]]


@dataclass(frozen=True)
class StageTime:
    """What a stage of this run took."""

    name: str
    seconds: float
    reused: bool = False


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows. What has a default may be left out, and its part of the page with it."""

    key: str
    """Of the run or the comparison."""
    scorer: str
    rows: Mapping[str, Row]
    """In the order shown. An evaluation's are called ``unguided``, ``teacher``, ``student``, ..."""
    about: str = ""
    """A sentence or two on what is compared, and how."""
    verdict: Verdict | None = None
    """None of a comparison that decides nothing."""
    pairings: Sequence[Pairing] = ()
    guidance_residual: float | None = None
    teacher: str | None = None
    memory_kind: str = ""
    """What ``Row.peak_bytes`` counts."""
    scorer_details: Mapping[str, Any] = field(default_factory=dict)
    """What determines its scores, as ``Scorer.describe`` says it."""
    control: Mapping[str, Sequence[ControlPoint]] = field(default_factory=dict)
    """By row."""
    residual_curve: Sequence[tuple[int, float]] = ()
    """(training step, guidance residual on held-out states)."""
    residual_by_guidance: Sequence[ResidualBucket] = ()
    residual_by_sigma: Sequence[SigmaBucket] = ()
    loss_curve: Sequence[tuple[int, float]] = ()
    pictures: Sequence[PictureSet] = ()
    swept: Sequence[SweptPictures] = ()
    stages: Sequence[StageTime] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Nested or flat. Give ``Settings.content()``: it holds no address of a server."""
    versions: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    model_name: str | None = None
    model_version: str | None = None
    created: str | None = None
    """Date and time as it shall read."""
