"""From plain values to the page. Pure.

Pictures are data URIs, charts inline SVG, the script is the page's own; a content security policy forbids the rest.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from teefusion.group_means import OVERALL, BenchmarkScore, Mean
from teefusion.report.charts import charts, styles_of
from teefusion.report.data import ReportData
from teefusion.report.numbers import duration, gibibytes, number, signed
from teefusion.report.pictures import data_uris, longest_side

_SMALL_SIDE = 128  # pixels; of larger pictures one prompt is as wide as the page
_HEADLINES = {
    "passed": ("✓", "Passed: this student can stand in for its guided teacher"),
    "failed": ("✗", "Not passed: this student cannot stand in for its guided teacher"),
    "not enough evidence": ("?", "Not enough evidence: too few prompts to tell whether this student can stand in"),
    None: ("≈", "Comparison"),
}


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
    uris = data_uris(_all_pictures(data))
    filters: dict[str, Callable[..., Any]] = {
        "score": lambda value: number(value, decimals),
        "signed": lambda value: signed(value, decimals),
        "compact": lambda value: number(value, None),
        "seconds": lambda value: number(value, 3),
        "gibibytes": gibibytes,
        "duration": duration,
        "data_uri": uris.__getitem__,
        "transposed": lambda rows: list(zip(*rows, strict=True)),
    }
    environment.filters |= filters
    script = (resources.files("teefusion") / "templates" / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html.j2").render(
        data=data,
        outcome=data.verdict.outcome if data.verdict else None,
        headline=_HEADLINES[data.verdict.outcome if data.verdict else None],
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        overall=OVERALL,
        styles=styles_of(data),
        counts={style: score.n for row in data.rows.values() for style, score in row.scores.items()},
        interval=data.verdict.intervals.get(OVERALL) if data.verdict else None,
        confidence=f"{(data.verdict.confidence if data.verdict else 0.95) * 100:g}\N{NARROW NO-BREAK SPACE}%",
        speedup=_ratio(data, "teacher", "student", lambda row: row.seconds and row.seconds.median),
        nfe_ratio=_ratio(data, "student", "teacher", lambda row: row.nfe),
        diversity_ratio=_ratio(data, "student", "teacher", lambda row: row.diversity and row.diversity.mean),
        kept=_guidance_gain(data),
        scales=sorted({scale for shown in data.swept for by_scale in shown.pictures.values() for scale in by_scale}),
        large=any(longest_side(picture) > _SMALL_SIDE for picture in _all_pictures(data)),
        charts=charts(data, decimals),
        settings=dict(_flatten(data.settings)),
        benchmark=_benchmark(data),
        scorer_details={name: value for name, value in _flatten(data.scorer_details) if value is not None},
    )


def _all_pictures(data: ReportData) -> Iterator[bytes]:
    for shown in data.pictures:
        yield from shown.pictures.values()
    for swept in data.swept:
        for by_scale in swept.pictures.values():
            yield from by_scale.values()


def _benchmark(data: ReportData) -> Mapping[str, BenchmarkScore]:
    """By row, where groups say more than the table of scores: of a single group there is no deviation."""
    found = {name: row.benchmark for name, row in data.rows.items() if row.benchmark}
    several = any(style.groups > 1 for score in found.values() for style in score.styles.values())
    return found if several else {}


def _ratio(data: ReportData, over: str, under: str, read: Callable[[Any], float | None]) -> float | None:
    """One row's value over another's; none where either was not measured."""
    if over not in data.rows or under not in data.rows:
        return None
    above, below = read(data.rows[over]), read(data.rows[under])
    if above is None or below is None:
        return None
    return above / below if math.isfinite(above) and math.isfinite(below) and above > 0 < below else None


def _guidance_gain(data: ReportData) -> tuple[float, float] | None:
    """Points that guidance adds to the teacher, and the share the student keeps; none where it adds too little."""
    overall: dict[str, Mean] = {name: row.scores[OVERALL] for name, row in data.rows.items() if OVERALL in row.scores}
    if not {"unguided", "teacher", "student"} <= overall.keys():
        return None
    gain = overall["teacher"].mean - overall["unguided"].mean
    noise = math.hypot(overall["teacher"].standard_error, overall["unguided"].standard_error)
    share = (overall["student"].mean - overall["unguided"].mean) / gain if gain > 2 * noise else math.nan
    return (gain, share) if math.isfinite(share) else None


def _decimals(data: ReportData) -> int:
    """As many for all scores of a report, by their size."""
    means = [abs(score.mean) for row in data.rows.values() for score in row.scores.values()]
    largest = max(filter(math.isfinite, means), default=0.0)
    return 2 if largest >= 10 else 3 if largest >= 1 else 4


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys, as settings are named on the command line."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
