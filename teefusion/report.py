"""The report a person looks at: one HTML file that needs nothing else, understood in a minute.

``render_report`` is pure: plain values in, text out. Charts are SVG whose colours are the page's CSS variables, so that
they follow its light and dark scheme; pictures are data URIs; a content security policy forbids the rest.
"""

from __future__ import annotations

import base64
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from teefusion.gate import OVERALL, Interval, Verdict
from teefusion.group_means import BenchmarkScore

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROWS = {"unguided": "Teacher without guidance", "teacher": "Teacher", "student": "Student"}
_MINUS = "\N{MINUS SIGN}"
_SMALL_SIDE = 128  # pixels
_LARGEST_SIDE = 512  # pixels; larger pictures are shown smaller, or four prompts would be a file of 100 MB


@dataclass(frozen=True)
class Score:
    """Of one row in one style."""

    mean: float
    standard_error: float
    n: int


@dataclass(frozen=True)
class Timing:
    """Seconds a picture over the batches of one evaluation, text encoding and decoding included."""

    median: float
    min: float | None = None
    max: float | None = None


@dataclass(frozen=True)
class ResidualBucket:
    """Guidance residual of held-out states with a guidance scale from ``low`` to ``high``."""

    low: float
    high: float
    residual: float


@dataclass(frozen=True)
class PictureSet:
    """Pictures of one prompt from one seed, as PNG, by guidance scale."""

    prompt: str
    style: str
    unguided: bytes | None
    """The teacher without guidance."""
    teacher: Mapping[float, bytes]
    student: Mapping[float, bytes]


@dataclass(frozen=True)
class StageTime:
    """What a stage of this run took."""

    name: str
    seconds: float
    reused: bool = False


@dataclass(frozen=True)
class ReportData:
    """Everything the report shows. What has a default may be left out, and its part of the page with it."""

    run_key: str
    teacher: str
    strategy: str
    num_steps: int
    guidance_scale: float
    """s of teacher and student in the comparison."""
    scorer: str
    verdict: Verdict
    scores: Mapping[str, Mapping[str, Score]]
    """By row (``unguided``, ``teacher``, ``student``), then ``overall`` and each style."""
    nfe: Mapping[str, float]
    """Forwards a picture, by row."""
    seconds_per_image: Mapping[str, Timing]
    """By row."""
    guidance_residual: float
    scorer_details: Mapping[str, Any] = field(default_factory=dict)
    """What determines its scores, as ``Scorer.describe`` says it."""
    benchmark: Mapping[str, BenchmarkScore] = field(default_factory=dict)
    """By row; empty where the prompts are no whole groups."""
    residual_curve: Sequence[tuple[int, float]] = ()
    """(training step, guidance residual on held-out states)."""
    residual_by_guidance: Sequence[ResidualBucket] = ()
    loss_curve: Sequence[tuple[int, float]] = ()
    pictures: Sequence[PictureSet] = ()
    stages: Sequence[StageTime] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Nested or flat. Give ``Settings.content()``: it holds no address of a server."""
    versions: Mapping[str, str] = field(default_factory=dict)
    digests: Mapping[str, str] = field(default_factory=dict)
    model_name: str | None = None
    model_version: str | None = None
    created: str | None = None
    """Date and time as it shall read."""


def render_report(data: ReportData) -> str:
    """The report as HTML. Reads only the template; text from outside (prompts, names) is escaped."""
    environment = Environment(
        loader=PackageLoader("teefusion", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    decimals = _decimals(data)
    filters: dict[str, Callable[..., str]] = {
        "score": lambda value: _number(value, decimals),
        "signed": lambda value: _signed(value, decimals),
        "compact": lambda value: _number(value, None),
        "seconds": lambda value: _number(value, 3),
        "duration": _duration,
        "data_uri": _data_uri,
    }
    environment.filters |= filters
    return environment.get_template("report.html.j2").render(
        data=data,
        rows={row: title for row, title in ROWS.items() if row in data.scores},
        overall=OVERALL,
        styles=_styles(data),
        counts={style: score.n for by_style in data.scores.values() for style, score in by_style.items()},
        intervals=data.verdict.intervals,
        confidence=f"{data.verdict.confidence * 100:g}\N{NARROW NO-BREAK SPACE}%",
        speedup=_ratio(data.seconds_per_image, "teacher", "student", lambda timing: timing.median),
        nfe_ratio=_ratio(data.nfe, "student", "teacher", float),
        kept=_guidance_gain(data),
        scales=sorted({scale for shown in data.pictures for scale in (*shown.teacher, *shown.student)}),
        # Under plain CFG the teacher at s = 1 is the unguided teacher, and is shown once.
        has_unguided=any(shown.unguided not in (None, shown.teacher.get(1.0)) for shown in data.pictures),
        large=any(_is_large(picture) for shown in data.pictures for picture in shown.student.values()),
        charts=dict(_charts(data, decimals)),
        settings=dict(_flatten(data.settings)),
        benchmark=_benchmark(data),
        scorer_details={name: value for name, value in _flatten(data.scorer_details) if value is not None},
    )


def _styles(data: ReportData) -> list[str]:
    """``overall``, then every style that any row was scored in."""
    names = {style for by_style in data.scores.values() for style in by_style}
    return [name for name in (OVERALL, *sorted(names - {OVERALL})) if name in names]


def _benchmark(data: ReportData) -> Mapping[str, BenchmarkScore]:
    """By row, where groups say more than the table of scores: of a single group there is no deviation."""
    several = any(style.groups > 1 for score in data.benchmark.values() for style in score.styles.values())
    return data.benchmark if several else {}


def _ratio(values: Mapping[str, Any], over: str, under: str, read: Callable[[Any], float]) -> float | None:
    """One row's value over another's; none where either was not measured."""
    if over not in values or under not in values:
        return None
    above, below = read(values[over]), read(values[under])
    return above / below if math.isfinite(above) and math.isfinite(below) and above > 0 < below else None


def _guidance_gain(data: ReportData) -> tuple[float, float] | None:
    """Points that guidance adds to the teacher, and the share the student keeps; none where it adds too little."""
    overall = {row: data.scores[row][OVERALL] for row in ROWS if OVERALL in data.scores.get(row, {})}
    if len(overall) < len(ROWS):
        return None
    gain = overall["teacher"].mean - overall["unguided"].mean
    noise = math.hypot(overall["teacher"].standard_error, overall["unguided"].standard_error)
    share = (overall["student"].mean - overall["unguided"].mean) / gain if gain > 2 * noise else math.nan
    return (gain, share) if math.isfinite(share) else None


# Words and numbers


def _decimals(data: ReportData) -> int:
    """As many for all scores of a report, by their size."""
    means = [abs(score.mean) for by_style in data.scores.values() for score in by_style.values()]
    largest = max(filter(math.isfinite, means), default=0.0)
    return 2 if largest >= 10 else 3 if largest >= 1 else 4


def _number(value: float | None, decimals: int | None) -> str:
    """With a typographic minus; ``decimals`` none is as many as needed, up to four digits."""
    if value is None or not math.isfinite(value):
        return "not measured"
    text = f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
    return text.replace("-", _MINUS) if float(text) else text.removeprefix("-")


def _signed(value: float, decimals: int) -> str:
    text = _number(value, decimals)
    return f"+{text}" if value > 0 and float(f"{value:.{decimals}f}") else text


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, as settings are named on the command line."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_large(picture: bytes) -> bool:
    """Too large for two prompts beside each other."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        return max(image.size) > _SMALL_SIDE


def _data_uri(picture: bytes) -> str:
    """Small pictures as they are, bit for bit; large ones smaller, as WebP."""
    from PIL import Image

    with Image.open(io.BytesIO(picture)) as image:
        if max(image.size) <= _LARGEST_SIDE and image.format == "PNG":
            return f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        shown = image.convert("RGB")
        shown.thumbnail((_LARGEST_SIDE, _LARGEST_SIDE))
        stream = io.BytesIO()
        shown.save(stream, "WEBP", quality=90)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"


# Charts. matplotlib takes colours only, so each CSS variable has one of its own, replaced once the chart is drawn.

_COLORS = {
    name: f"#0000{index:02x}"
    for index, name in enumerate(("ink", "muted", "line", "unguided", "teacher", "student", "good", "bad"), start=1)
}
_MARKERS = {"unguided": "o", "teacher": "s", "student": "D"}
_STYLE: Any = {
    "svg.fonttype": "none",  # text stays text: the page's font, selectable, and small
    "text.parse_math": False,  # a style's name may hold a dollar sign
    "font.size": 10,
    "text.color": _COLORS["ink"],
    "axes.edgecolor": _COLORS["line"],
    "axes.labelcolor": _COLORS["muted"],
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": _COLORS["line"],
    "xtick.color": _COLORS["muted"],
    "xtick.labelsize": 9,
    "ytick.color": _COLORS["muted"],
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
_HIGHEST_RESIDUAL = 1.5  # that is drawn
_WIDTH = 4.8  # inches; the page scales a chart to its column, so a smaller one has larger letters
_NARROW = (3.7, 2.3)


def _charts(data: ReportData, decimals: int) -> Iterator[tuple[str, Markup]]:
    """Charts by name; those without data are left out."""
    size = (_WIDTH, 1.1 + 0.42 * max(len(_styles(data)), len(data.verdict.intervals)))  # one line a style
    curve, losses = _finite(data.residual_curve), _finite(data.loss_curve)
    if any(_finite_scores(by_style) for by_style in data.scores.values()):
        label = "Scores by style, also in the table below."
        yield "scores", _draw("scores", label, size, lambda axes: _score_chart(axes, data))
    if data.verdict.intervals:
        label = "Student minus teacher with its interval and the limit, also in the table below."
        yield (
            "differences",
            _draw("differences", label, size, lambda axes: _difference_chart(axes, data.verdict.intervals, decimals)),
        )
    if len(curve) > 1:
        label = (
            f"Guidance residual, {curve[0][1]:.3g} at step {curve[0][0]}, {curve[-1][1]:.3g} at step {curve[-1][0]}."
        )
        yield "residual", _draw("residual", label, _NARROW, lambda axes: _residual_chart(axes, curve))
    if buckets := [bucket for bucket in data.residual_by_guidance if math.isfinite(bucket.residual)]:
        worst = max(buckets, key=lambda bucket: bucket.residual)
        label = f"Guidance residual by scale; at most {worst.residual:.3g}, from s = {worst.low:g} to {worst.high:g}."
        yield "buckets", _draw("buckets", label, _NARROW, lambda axes: _bucket_chart(axes, buckets))
    if len(losses) > 1:
        label = (
            f"Training loss, {losses[0][1]:.3g} at step {losses[0][0]}, {losses[-1][1]:.3g} at step {losses[-1][0]}."
        )
        yield "loss", _draw("loss", label, _NARROW, lambda axes: _loss_chart(axes, losses))


def _draw(name: str, label: str, size: tuple[float, float], plot: Callable[[Axes], None]) -> Markup:
    """Plot into a fresh figure; give it back as inline SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the browser has the fonts, we only measure
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        plot(axes)
        return _inline_svg(figure, name, label)


def _inline_svg(figure: Figure, name: str, label: str) -> Markup:
    stream = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))  # each none: no block of links to vocabularies
    figure.savefig(stream, format="svg", transparent=True, metadata=metadata)
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    # Several figures share one page, and matplotlib gives them all the same names.
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    for variable, color in _COLORS.items():
        svg = svg.replace(color, f"var(--{variable})")
    # Width and height come from the page; the view box keeps the proportions.
    head, body = svg.split(">", 1)
    head = re.sub(r'\s(width|height)="[^"]*"', "", head)
    return Markup(head) + Markup(' role="img" aria-label="{}">').format(label) + Markup(body)


def _score_chart(axes: Axes, data: ReportData) -> None:
    styles = _styles(data)
    rows = [row for row in ROWS if row in data.scores]
    for k, row in enumerate(rows):
        scores = _finite_scores(data.scores[row])
        shown = [(place, scores[style]) for place, style in enumerate(styles) if style in scores]
        axes.errorbar(
            [score.mean for _, score in shown],
            [place + (k - (len(rows) - 1) / 2) * 0.22 for place, _ in shown],
            xerr=[1.96 * score.standard_error if math.isfinite(score.standard_error) else 0 for _, score in shown],
            fmt=_MARKERS[row],
            markersize=5,
            color=_COLORS[row],
            elinewidth=1.6,
            label=ROWS[row],
        )
    _name_rows(axes, styles)
    axes.set_xlabel("score, with its 95 % interval")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, handletextpad=0.2, columnspacing=1.0)


def _difference_chart(axes: Axes, intervals: Mapping[str, Interval], decimals: int) -> None:
    axes.axvline(0, color=_COLORS["muted"], linewidth=1)
    for place, interval in enumerate(intervals.values()):
        color = _COLORS["good" if interval.passed else "bad"]
        axes.plot([interval.low, interval.high], [place, place], color=color, linewidth=2.4, solid_capstyle="butt")
        axes.plot(interval.difference, place, marker="D" if interval.passed else "X", markersize=6, color=color)
        limit = [-interval.margin, -interval.margin]
        axes.plot(limit, [place - 0.32, place + 0.32], color=_COLORS["bad"], linewidth=1.6, linestyle=(0, (2, 1.2)))
    axes.margins(x=0.12)
    _name_rows(axes, list(intervals))
    axes.set_xlabel("student minus teacher, score points (0: the same)")


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """One line a style, the first on top."""
    axes.set_yticks(range(len(names)), [name if len(name) <= 20 else f"{name[:19]}…" for name in names])
    for tick in axes.get_yticklabels():
        tick.set_color(_COLORS["ink"])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", linewidth=0.7)
    axes.set_axisbelow(True)


def _residual_chart(axes: Axes, curve: Sequence[tuple[int, float]]) -> None:
    steps, residuals = zip(*curve, strict=True)
    axes.axhline(1, color=_COLORS["muted"], linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "no guidance learned",
        (1, 1),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=_COLORS["muted"],
    )
    axes.plot(steps, residuals, color=_COLORS["student"], linewidth=2, marker="o", markersize=4)
    top = max(1.15, 1.05 * min(max(residuals), _HIGHEST_RESIDUAL))
    if residuals[0] > top:  # the fused term disturbs the teacher before it is trained; the rest is what matters
        axes.annotate(
            f"from {residuals[0]:.1f}", (steps[0], top), xytext=(6, -14), textcoords="offset points", fontsize=9
        )
    axes.set_ylim(0, top)
    _step_axes(axes, "guidance residual")


def _bucket_chart(axes: Axes, buckets: Sequence[ResidualBucket]) -> None:
    axes.bar(
        [(bucket.low + bucket.high) / 2 for bucket in buckets],
        [bucket.residual for bucket in buckets],
        width=[0.9 * (bucket.high - bucket.low) for bucket in buckets],
        color=_COLORS["student"],
    )
    axes.set_ylabel("guidance residual")
    axes.set_xlabel("guidance scale s")
    axes.grid(axis="y", linewidth=0.7)
    axes.set_axisbelow(True)


def _loss_chart(axes: Axes, losses: Sequence[tuple[int, float]]) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    steps, values = zip(*losses, strict=True)
    axes.plot(steps, values, color=_COLORS["student"], linewidth=1.2)
    if min(values) > 0:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")  # the usual one writes powers as mathematics, which is off here
        axes.yaxis.set_minor_locator(NullLocator())
    _step_axes(axes, "training loss")


def _step_axes(axes: Axes, label: str) -> None:
    axes.set_xlabel("training step")
    axes.set_ylabel(label)
    axes.grid(axis="y", linewidth=0.7)
    axes.set_axisbelow(True)


def _finite(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _finite_scores(scores: Mapping[str, Score]) -> dict[str, Score]:
    return {style: score for style, score in scores.items() if math.isfinite(score.mean)}
