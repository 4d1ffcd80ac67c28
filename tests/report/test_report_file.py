"""The report as a file: foreign markup is text in it, it loads nothing, and it is small."""

from __future__ import annotations

import base64
import hashlib
import re
import subprocess
import sys

from teefusion.gate import Verdict
from teefusion.group_means import OVERALL, Mean
from teefusion.report import Pairing, PictureSet, Row, StageTime, render_report
from tests.reports import Page, interval, png, report_data


def test_the_same_data_gives_the_same_bytes(html: str) -> None:
    assert render_report(report_data()) == html


def test_markup_in_prompts_and_names_is_shown_not_obeyed() -> None:
    evil = '<script>alert(1)</script>"><img src=http://example.com/x>'
    shown = PictureSet(evil, evil, {"student": png("red")})
    intervals = {OVERALL: interval(0, 0, 0, 1), "$x^<b>&$": interval(0, 0, 0, 1)}
    styled = {"student": Row(evil, "student", {"$x^<b>&$": Mean(20.0, 0.1, 40)})}
    names = ("teacher", "key", "scorer", "about", "model_name", "created")
    html = render_report(
        report_data(
            pictures=[shown],
            swept=(),
            control={},
            verdict=Verdict("passed", (evil,), intervals),
            pairings=[Pairing(evil, intervals)],
            rows=styled,
            settings={evil: evil},
            stages=[StageTime(evil, 1.0)],
            **dict.fromkeys(names, evil),
        )
    )
    page = Page(html)
    assert len(page.named("script")) == 1  # its own
    assert page.named("b") == []
    assert len(page.pictures()) == 1
    assert page.mistakes == []
    assert "<script>alert(1)</script>" in page.texts["reasons"]  # as text
    assert html.count("$x^&lt;b&gt;&amp;$</text>") == 2  # in both charts, and no mathematics


def test_it_refers_to_nothing_outside_itself(page: Page, html: str) -> None:
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(\s*['\"]?([^)'\"]*)", html))
    policy = next(a["content"] for a in page.named("meta") if a.get("http-equiv") == "Content-Security-Policy")
    script = html.split("<script>")[1].split("</script>")[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def test_it_is_small_beside_its_pictures(html: str) -> None:
    assert 20_000 < len(html.encode()) < 200_000


def test_the_report_needs_no_torch() -> None:
    code = "import sys, teefusion.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
