"""The report's charts: SVG by matplotlib whose colours are the page's CSS variables, so that they follow its scheme."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from teefusion.group_means import OVERALL, Mean
from teefusion.intervals import Interval
from teefusion.report.data import ControlPoint, Pairing, ReportData, ResidualBucket, Row, SigmaBucket
from teefusion.report.numbers import number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# matplotlib takes colours only, so each CSS variable has one of its own, replaced once the chart is drawn.
_NAMES = ("ink", "muted", "line", "good", "bad", "unguided", "teacher", "student", "champion", "cfg", "matched")
_COLORS = {name: f"#0000{index:02x}" for index, name in enumerate(_NAMES, start=1)}
_MARKERS = {"unguided": "o", "teacher": "s", "student": "D", "champion": "^", "cfg": "v", "matched": "P"}
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
Plot = Callable[["Axes"], None]


def styles_of(data: ReportData) -> list[str]:
    """``overall``, then every style that any row was scored in."""
    names = {style for row in data.rows.values() for style in row.scores}
    return [name for name in (OVERALL, *sorted(names - {OVERALL})) if name in names]


def charts(data: ReportData, decimals: int) -> dict[str, Markup]:
    """Charts by name; those without data are left out."""
    found = (*_score_charts(data, decimals), *_control_charts(data), *_training_charts(data))
    return {name: _draw(name, label, size, plot) for name, label, size, plot in found}


_Chart = tuple[str, str, tuple[float, float], Plot]  # name, what it says to who cannot see it, inches, how


def _score_charts(data: ReportData, decimals: int) -> Iterator[_Chart]:
    lines = max(len(styles_of(data)), *(len(pairing.intervals) for pairing in data.pairings), 1)
    size = (_WIDTH, 1.1 + (0.42 + 0.06 * max(0, len(data.rows) - 3)) * lines)  # one line a style
    if any(_finite_scores(row.scores) for row in data.rows.values()):
        label = "Scores by style, also in the table below."
        yield "scores", label, size, lambda axes: _score_chart(axes, data)
    for k, pairing in enumerate(data.pairings):
        if pairing.intervals:
            label = f"{pairing.title} with its interval and the limit, also in the table below."
            yield f"differences{k or ''}", label, size, _difference_plot(pairing, decimals)
    timed = [row for row in data.rows.values() if row.seconds and OVERALL in _finite_scores(row.scores)]
    if len(timed) > 1:
        label = "Score against seconds a picture, also in the table below."
        yield "seconds", label, (_WIDTH, 3.0), lambda axes: _seconds_chart(axes, timed)


def _control_charts(data: ReportData) -> Iterator[_Chart]:
    if any(len(points) > 1 for points in data.control.values()):
        for name, ylabel in (("score", "score"), ("saturation", "mean saturation")):
            label = f"{ylabel.capitalize()} over the guidance scale s, also in the table below."
            yield f"control-{name}", label, (_WIDTH, 2.6), _control_plot(data, name, ylabel)


def _training_charts(data: ReportData) -> Iterator[_Chart]:
    curve, losses = _finite(data.residual_curve), _finite(data.loss_curve)
    if len(curve) > 1:
        label = (
            f"Guidance residual, {curve[0][1]:.3g} at step {curve[0][0]}, {curve[-1][1]:.3g} at step {curve[-1][0]}."
        )
        yield "residual", label, _NARROW, lambda axes: _residual_chart(axes, curve)
    if buckets := [bucket for bucket in data.residual_by_guidance if math.isfinite(bucket.residual)]:
        worst = max(buckets, key=lambda bucket: bucket.residual)
        label = f"Guidance residual by scale; at most {worst.residual:.3g}, from s = {worst.low:g} to {worst.high:g}."
        yield "buckets", label, _NARROW, lambda axes: _bucket_chart(axes, buckets)
    if any(bucket.by_guidance for bucket in data.residual_by_sigma):
        label = "Guidance residual over sigma and guidance scale; the numbers stand in the cells."
        yield "heat", label, (_WIDTH, 3.1), lambda axes: _heat_map(axes, data.residual_by_sigma)
    if len(losses) > 1:
        label = (
            f"Training loss, {losses[0][1]:.3g} at step {losses[0][0]}, {losses[-1][1]:.3g} at step {losses[-1][0]}."
        )
        yield "loss", label, _NARROW, lambda axes: _loss_chart(axes, losses)


def _draw(name: str, label: str, size: tuple[float, float], plot: Plot) -> Markup:
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


# Scores


def _score_chart(axes: Axes, data: ReportData) -> None:
    styles, count = styles_of(data), len(data.rows)
    for k, row in enumerate(data.rows.values()):
        scores = _finite_scores(row.scores)
        shown = [(place, scores[style]) for place, style in enumerate(styles) if style in scores]
        axes.errorbar(
            [score.mean for _, score in shown],
            [place + (k - (count - 1) / 2) * min(0.22, 0.7 / count) for place, _ in shown],
            xerr=[_half_width(score) for _, score in shown],
            fmt=_MARKERS[row.color],
            markersize=5,
            color=_COLORS[row.color],
            elinewidth=1.6,
            label=_shortened(row.title),
        )
    _name_rows(axes, styles)
    axes.set_xlabel("score, with its 95 % interval")
    _legend(axes)


def _difference_plot(pairing: Pairing, decimals: int) -> Plot:
    def plot(axes: Axes) -> None:
        axes.axvline(0, color=_COLORS["muted"], linewidth=1)
        for place, interval in enumerate(pairing.intervals.values()):
            _interval(axes, place, interval)
        axes.margins(x=0.12)
        _name_rows(axes, list(pairing.intervals))
        axes.set_xlabel("difference in score points (0: the same)")

    return plot


def _interval(axes: Axes, place: int, interval: Interval) -> None:
    color = _COLORS["good" if interval.passed else "bad"]
    axes.plot([interval.low, interval.high], [place, place], color=color, linewidth=2.4, solid_capstyle="butt")
    axes.plot(interval.difference, place, marker="D" if interval.passed else "X", markersize=6, color=color)
    limit = [-interval.margin, -interval.margin]
    axes.plot(limit, [place - 0.32, place + 0.32], color=_COLORS["bad"], linewidth=1.6, linestyle=(0, (2, 1.2)))


def _seconds_chart(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        seconds, score = row.seconds, row.scores[OVERALL]
        assert seconds is not None, "only timed rows are drawn"
        low, high = seconds.min or seconds.median, seconds.max or seconds.median
        axes.errorbar(
            [seconds.median],
            [score.mean],
            xerr=[[seconds.median - low], [high - seconds.median]],
            yerr=[_half_width(score)],
            fmt=_MARKERS[row.color],
            color=_COLORS[row.color],
            elinewidth=1.2,
            label=_shortened(row.title),
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds a picture (median; least to greatest)")
    axes.set_ylabel("score, with its 95 % interval")
    axes.grid(linewidth=0.7)
    axes.set_axisbelow(True)
    _legend(axes)


def _legend(axes: Axes) -> None:
    """Above the chart, as wide as it is."""
    columns = 3 if len(axes.get_legend_handles_labels()[1]) <= 3 else 2
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, handletextpad=0.2, columnspacing=1.0)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """One line a style, the first on top."""
    axes.set_yticks(range(len(names)), [_shortened(name) for name in names])
    for tick in axes.get_yticklabels():
        tick.set_color(_COLORS["ink"])
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", linewidth=0.7)
    axes.set_axisbelow(True)


# Guidance


def _control_plot(data: ReportData, name: str, ylabel: str) -> Plot:
    def mean(point: ControlPoint) -> Mean:
        value: Mean = getattr(point, name)
        return value

    def plot(axes: Axes) -> None:
        for key, points in data.control.items():
            row = data.rows[key]
            axes.plot(
                [point.scale for point in points],
                [mean(point).mean for point in points],
                f"-{_MARKERS[row.color]}",
                markersize=5,
                color=_COLORS[row.color],
                label=_shortened(row.title),
            )
        axes.set_xlabel("guidance scale s")
        axes.set_ylabel(ylabel)
        axes.grid(axis="y", linewidth=0.7)
        axes.set_axisbelow(True)
        _legend(axes)

    return plot


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


def _heat_map(axes: Axes, rows: Sequence[SigmaBucket]) -> None:
    """A cell a bucket of s and sigma; its colour goes from the page's own to the student's, so both schemes read it."""
    from matplotlib.patches import Rectangle

    cells = [(row, cell) for row in rows for cell in row.by_guidance if math.isfinite(cell.residual)]
    highest = max([1.0, *(min(cell.residual, _HIGHEST_RESIDUAL) for _, cell in cells)])
    for row, cell in cells:
        corner, width, height = (cell.low, row.low), cell.high - cell.low, row.high - row.low
        alpha = 0.05 + 0.6 * min(cell.residual, highest) / highest
        axes.add_patch(Rectangle(corner, width, height, facecolor=_COLORS["student"], alpha=alpha, linewidth=0))
        middle = (cell.low + width / 2, row.low + height / 2)
        axes.annotate(number(cell.residual, 2), middle, ha="center", va="center", fontsize=8)
    axes.set_xlim(min(cell.low for _, cell in cells), max(cell.high for _, cell in cells))
    axes.set_ylim(0, 1)
    axes.set_xlabel("guidance scale s")
    axes.set_ylabel("sigma (1 is noise)")


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


def _half_width(score: Mean) -> float:
    """Of the 95 % interval; nothing is drawn where it is not known."""
    return 1.96 * score.standard_error if math.isfinite(score.standard_error) else 0.0


def _shortened(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:23]}…"


def _finite(curve: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    return [(step, value) for step, value in curve if math.isfinite(value)]


def _finite_scores(scores: Mapping[str, Mean]) -> dict[str, Mean]:
    return {style: score for style, score in scores.items() if math.isfinite(score.mean)}
