"""The charts: their names, their colours, and what becomes of them without data."""

from __future__ import annotations

import math
import re

import pytest

from teefusion.group_means import OVERALL
from teefusion.report import Pairing, ResidualBucket, SigmaBucket, render_report
from tests.reports import Page, interval, report_data, rows


def test_charts_are_named_inline_and_take_their_colours_from_the_page(html: str, page: Page) -> None:
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 9
    assert all('role="img" aria-label="' in chart for chart in charts)
    labels = [attributes["aria-label"] for attributes in page.named("svg")]
    assert "Guidance residual, 1 at step 0, 0.117 at step 200." in labels
    assert "Guidance residual by scale; at most 0.2, from s = 1 to 4." in labels
    assert all(not re.search(r"#0000[0-9a-f]{2}", chart) for chart in charts)
    used = set(re.findall(r"var\(--(\w+)\)", "".join(charts)))
    assert {"ink", "muted", "line", "unguided", "teacher", "student", "good", "bad"} <= used
    for scheme in html.split("prefers-color-scheme: dark")[:2]:
        assert all(f"--{variable}: #" in scheme for variable in used)


def test_a_style_beyond_its_margin_is_drawn_as_bad() -> None:
    def colors(margin: float) -> str:
        pairing = Pairing("student minus teacher", {OVERALL: interval(-0.5, -1, 0, margin)})
        drawn = render_report(report_data(pairings=[pairing]))
        return drawn.split('id="chart-differences"')[1].split("</figure>")[0]

    assert "var(--good)" in colors(2)
    assert "var(--good)" not in colors(0.5)


@pytest.mark.parametrize(
    ("changes", "chart"),
    [
        ({"residual_curve": ()}, "residual"),
        ({"residual_curve": [(0, math.nan), (1, 0.5)]}, "residual"),
        ({"residual_by_guidance": ()}, "buckets"),
        ({"residual_by_guidance": [ResidualBucket(1, 7, math.nan)]}, "buckets"),
        ({"loss_curve": ()}, "loss"),
        ({"residual_by_sigma": [SigmaBucket(0, 1, ())]}, "heat"),
        ({"pairings": [Pairing("student minus teacher", {})]}, "differences"),
        ({"rows": rows(scores={}), "control": {}}, "scores"),
        ({"rows": rows(seconds=None)}, "seconds"),
        ({"control": {}}, "control-score"),
    ],
)
def test_a_chart_without_data_is_left_out(changes: dict[str, object], chart: str) -> None:
    figures = {attributes.get("id") for attributes in Page(render_report(report_data(**changes))).named("figure")}
    assert f"chart-{chart}" not in figures
    assert {f"chart-{name}" for name in ("differences", "residual", "buckets", "heat", "loss")} - figures <= {
        f"chart-{chart}"
    }
