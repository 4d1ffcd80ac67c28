"""The report: what a reader finds where, that it holds no foreign markup and loads nothing, and a browser's view."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
import shutil
import socketserver
import subprocess
import sys
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from teefusion.gate import OVERALL, Interval, Verdict
from teefusion.group_means import benchmark_score
from teefusion.report import PictureSet, ReportData, ResidualBucket, Score, StageTime, Timing, render_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "br"}


def png(color: str, side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), color).save(stream, "PNG")
    return stream.getvalue()


def interval(difference: float, low: float, high: float, margin: float) -> Interval:
    return Interval(40, 20.0, 20.0 + difference, difference, low, high, margin)


def report_data(**changes: object) -> ReportData:
    """A student that passed, in two styles, with everything a report can show."""
    by_row = {"unguided": 15.0, "teacher": 20.0, "student": 19.9}
    base = ReportData(
        run_key="0123456789abcdef",
        teacher="shapes",
        strategy="euler_cfg",
        num_steps=20,
        guidance_scale=4.0,
        scorer="bundled:shapes",
        verdict=Verdict(
            passed=True,
            reasons=("Overall it holds.", "No style falls behind."),
            intervals={
                OVERALL: interval(-0.1, -0.19, 0.02, 0.2),
                "anime": interval(-0.25, -0.3, 0.14, 0.6),
                "photo": interval(0.05, -0.2, 0.31, 0.6),
            },
        ),
        scores={
            row: {style: Score(mean, 0.25, 80 if style == OVERALL else 40) for style in (OVERALL, "anime", "photo")}
            for row, mean in by_row.items()
        },
        nfe={"unguided": 20.0, "teacher": 40.0, "student": 20.0},
        seconds_per_image={"teacher": Timing(0.24, 0.23, 0.27), "student": Timing(0.125)},
        guidance_residual=0.117,
        residual_curve=[(0, 1.0), (100, 0.4), (200, 0.117)],
        residual_by_guidance=[ResidualBucket(1, 4, 0.2), ResidualBucket(4, 7, 0.1)],
        loss_curve=[(10, 0.5), (200, 0.02)],
        pictures=[
            PictureSet(
                prompt="a red star",
                style="anime",
                unguided=png("black"),
                teacher={1.0: png("black"), 4.0: png("red")},
                student={1.0: png("navy"), 4.0: png("orange")},
            )
        ],
        stages=[StageTime("targets", 75.0, True), StageTime("train", 3725.0)],
        settings={"train": {"steps": 600}, "evaluate.scorer": "bundled:shapes"},
        versions={"torch": "2.13.0"},
        digests={"prompts": "ab" * 32},
        model_name="teefusion-shapes",
        model_version="3",
        created="2025-11-21 10:40 UTC",
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


class Page(HTMLParser):
    """Tags in order, text by the id of the innermost named element, and whether every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, str] = {}
        self.unclosed: list[tuple[str, str]] = []
        self.mistakes: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = {name: value or "" for name, value in attrs}
        self.tags.append((tag, named))
        if tag not in VOID:
            self.unclosed.append((tag, named.get("id", "")))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        if not self.unclosed or self.unclosed.pop()[0] != tag:
            self.mistakes.append(tag)

    def handle_data(self, data: str) -> None:
        for _, name in self.unclosed:
            if name:
                self.texts[name] = " ".join(f"{self.texts.get(name, '')} {data}".split())

    def named(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def html() -> str:
    return render_report(report_data())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def words(html: str) -> str:
    """The page's text, without markup."""
    body = html.split("<body>", 1)[1]
    return " ".join(re.sub(r"<svg.*?</svg>|<[^>]+>", " ", body, flags=re.DOTALL).split())


# What a reader finds


def test_every_tag_is_closed_and_every_id_is_unique(page: Page) -> None:
    assert page.mistakes == []
    assert page.unclosed == []
    names = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(names) == len(set(names))


def test_the_verdict_and_its_reasons_come_first(html: str, page: Page) -> None:
    assert page.texts["verdict"] == "✓ Passed: this student can stand in for its guided teacher"
    assert page.texts["reasons"] == "Overall it holds. No style falls behind."
    order = [html.index(f'id="{name}"') for name in ("verdict", "numbers", "pictures", "training", "details")]
    assert order == sorted(order)


def test_a_failed_verdict_says_so_in_words_and_is_no_pass() -> None:
    failed = Verdict(False, ("Style photo: too low.",), {OVERALL: interval(-1, -1.5, -0.5, 0.2)})
    html = render_report(report_data(verdict=failed))
    page = Page(html)
    assert page.texts["verdict"] == "✗ Not passed: this student cannot stand in for its guided teacher"
    assert page.texts["reasons"] == "Style photo: too low."
    assert "Passed:" not in html
    assert "It is not registered." in words(html)
    assert "✗ no" in page.texts["scores"]
    assert "✓ yes" not in page.texts["scores"]


def test_the_headline_numbers_are_worked_out_from_the_measurements(html: str) -> None:
    text = words(html)
    assert "40 → 20 Evaluations of the transformer, teacher → student: 50 % of the teacher's." in text
    assert "1.92× Teacher 0.240 s a picture (0.230 to 0.270). Student 0.125 s a picture." in text  # 0.24 / 0.125
    assert "Guidance adds 5.00 points to the teacher; the student keeps 98 % of that." in text  # 4.9 of 5
    assert "Guidance residual 0.117" in text
    assert "−0.10 95 % interval −0.19 to +0.02; down to −0.20 is allowed." in text


def test_the_table_gives_scores_difference_interval_and_limit_by_style(page: Page) -> None:
    anime = "anime 15.00 ± 0.25 20.00 ± 0.25 19.90 ± 0.25 −0.25 −0.30 to +0.14 −0.60 ✓ yes 40 photo"
    assert anime in page.texts["scores"]
    assert "overall 15.00" in page.texts["scores"]


def test_the_benchmarks_number_is_shown_where_there_are_several_groups() -> None:
    several = benchmark_score({"anime": [14.0] * 80 + [16.0] * 80, "photo": [20.0] * 80})
    single = benchmark_score({"anime": [14.0] * 80})
    assert several is not None
    assert single is not None
    shown = Page(render_report(report_data(benchmark={"teacher": several, "student": several})))
    text = shown.texts["benchmark"]
    assert "means of groups of 80 prompts" in text
    assert "anime 15.00 ± 1.00 15.00 ± 1.00 2" in text
    assert "photo 20.00 20.00 1" in text  # of one group there is no deviation
    assert "average 16.67 16.67" in text
    assert not shown.unclosed
    assert not shown.mistakes
    assert "benchmark" not in Page(render_report(report_data(benchmark={"teacher": single}))).texts


def test_what_the_scorer_is_stands_in_the_details() -> None:
    described = {"name": "HPS v2.1", "version": "v2.1", "revision": None, "preprocessing": {"antialias": False}}
    html = render_report(report_data(scorer="HPS v2.1", scorer_details=described))
    assert "<summary>Scorer</summary>" in html
    assert '<th scope="row">preprocessing.antialias</th><td class="mono">False</td>' in html
    assert "revision" not in html


def test_what_guidance_adds_is_left_out_where_it_adds_nothing() -> None:
    scores = {row: {OVERALL: Score(20.0, 0.25, 80)} for row in ("unguided", "teacher", "student")}
    assert "Guidance adds" not in words(render_report(report_data(scores=scores)))


def test_pictures_stand_by_scale_and_say_what_they_are(page: Page) -> None:
    pictures = page.named("img")
    assert [picture["alt"] for picture in pictures] == [
        "a red star: teacher, guidance scale 1",
        "a red star: teacher, guidance scale 4",
        "a red star: student, guidance scale 1",
        "a red star: student, guidance scale 4",
    ]
    colors = [png(color) for color in ("black", "red", "navy", "orange")]
    assert [base64.b64decode(picture["src"].removeprefix("data:image/png;base64,")) for picture in pictures] == colors


def test_an_unguided_teacher_that_differs_from_scale_1_has_its_own_column() -> None:
    shown = dataclasses.replace(report_data().pictures[0], unguided=png("white"))
    alts = [picture["alt"] for picture in Page(render_report(report_data(pictures=[shown]))).named("img")]
    assert alts[0] == "a red star: teacher without guidance"
    assert len(alts) == 5


def test_a_scale_that_one_row_lacks_leaves_its_place_empty() -> None:
    shown = dataclasses.replace(report_data().pictures[0], teacher={4.0: png("red")}, unguided=None)
    page = Page(render_report(report_data(pictures=[shown])))
    assert [picture["alt"] for picture in page.named("img")] == [
        "a red star: teacher, guidance scale 4",
        "a red star: student, guidance scale 1",
        "a red star: student, guidance scale 4",
    ]


def test_a_large_picture_is_shown_smaller() -> None:
    shown = dataclasses.replace(report_data().pictures[0], student={4.0: png("red", side=1024)})
    source = Page(render_report(report_data(pictures=[shown]))).named("img")[-1]["src"]
    with Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,")))) as image:
        assert image.size == (512, 512)


def test_details_hold_stages_settings_digests_and_versions(html: str, page: Page) -> None:
    assert page.texts["stages"] == "targets 1 min 15 s, reused train 1 h 2 min"
    text = words(html)
    for fact in ("train.steps 600", "evaluate.scorer bundled:shapes", "torch 2.13.0", "prompts " + "ab" * 32):
        assert fact in text
    assert "run 0123456789abcdef model teefusion-shapes, version 3 2025-11-21 10:40 UTC" in text


# Charts


def test_charts_are_named_inline_and_take_their_colours_from_the_page(html: str, page: Page) -> None:
    charts = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    assert len(charts) == 5
    assert all('role="img" aria-label="' in chart for chart in charts)
    labels = [attributes["aria-label"] for attributes in page.named("svg")]
    assert "Guidance residual, 1 at step 0, 0.117 at step 200." in labels
    assert "Guidance residual by scale; at most 0.2, from s = 1 to 4." in labels
    assert all(not re.search(r"#0000\d\d", chart) for chart in charts)
    used = set(re.findall(r"var\(--(\w+)\)", "".join(charts)))
    assert {"ink", "muted", "line", "unguided", "teacher", "student", "good", "bad"} <= used
    for scheme in html.split("prefers-color-scheme: dark")[:2]:
        assert all(f"--{variable}: #" in scheme for variable in used)


def test_a_style_beyond_its_margin_is_drawn_as_bad() -> None:
    def colors(margin: float) -> str:
        verdict = Verdict(margin > 1, ("reason",), {OVERALL: interval(-0.5, -1, 0, margin)})
        drawn = render_report(report_data(verdict=verdict))
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
        ({"verdict": Verdict(False, ("nothing",))}, "differences"),
        ({"scores": {}}, "scores"),
    ],
)
def test_a_chart_without_data_is_left_out(changes: dict[str, object], chart: str) -> None:
    figures = {attributes.get("id") for attributes in Page(render_report(report_data(**changes))).named("figure")}
    assert f"chart-{chart}" not in figures
    assert len(figures & {f"chart-{name}" for name in ("scores", "differences", "residual", "buckets", "loss")}) == 4


def test_the_same_data_gives_the_same_bytes(html: str) -> None:
    assert render_report(report_data()) == html


# What it must not hold


def test_markup_in_prompts_and_names_is_shown_not_obeyed() -> None:
    evil = '<script>alert(1)</script>"><img src=http://example.com/x>'
    shown = dataclasses.replace(report_data().pictures[0], prompt=evil, style=evil)
    verdict = Verdict(True, (evil,), {OVERALL: interval(0, 0, 0, 1), "$x^<b>&$": interval(0, 0, 0, 1)})
    scores = {"student": {"$x^<b>&$": Score(20.0, 0.1, 40)}}
    names = ("teacher", "run_key", "scorer", "strategy", "model_name", "created")
    html = render_report(
        report_data(
            pictures=[shown],
            verdict=verdict,
            scores=scores,
            settings={evil: evil},
            stages=[StageTime(evil, 1.0)],
            **dict.fromkeys(names, evil),
        )
    )
    page = Page(html)
    assert page.named("script") == []
    assert page.named("b") == []
    assert len(page.named("img")) == 4
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
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_it_is_small_beside_its_pictures(html: str) -> None:
    assert 20_000 < len(html.encode()) < 200_000


def test_a_report_of_a_student_that_could_not_be_measured_still_reads() -> None:
    bare = ReportData(
        run_key="k",
        teacher="shapes",
        strategy="euler_cfg",
        num_steps=4,
        guidance_scale=4.0,
        scorer="none",
        verdict=Verdict(False, ("Nothing was measured.",)),
        scores={},
        nfe={},
        seconds_per_image={},
        guidance_residual=math.nan,
    )
    html = render_report(bare)
    assert Page(html).texts["reasons"] == "Nothing was measured."
    assert words(html).count("not measured") == 4
    assert "nan" not in words(html)


@pytest.mark.parametrize(("mean", "shown"), [(31.23456, "31.23"), (2.34567, "2.346"), (0.61234, "0.6123")])
def test_scores_have_as_many_decimals_as_their_size_asks_for(mean: float, shown: str) -> None:
    html = render_report(report_data(scores={"student": {OVERALL: Score(mean, 0.1, 40)}}))
    assert f"overall {shown} ±" in words(html)


def test_the_report_needs_no_torch() -> None:
    code = "import sys, teefusion.report; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# In a browser


class Proxy:
    """Every request a browser makes goes here, is written down and refused."""

    def __enter__(self) -> Proxy:
        requested = self.requested = []  # type: ignore[var-annotated]

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                requested.append(self.rfile.readline().decode(errors="replace").split()[1])
                self.wfile.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def of_the_page(self) -> list[str]:
        """Without what the browser asks its maker for."""
        return [url for url in self.requested if not re.search(r"(google|googleapis|gvt1)\.com", url)]


def browse(html: str, folder: Path) -> tuple[str, list[str]]:
    """The page as headless Chromium has built it, and what it asked the network for."""
    if BROWSER is None:
        pytest.skip("no Chromium here: apt-get install chromium")
    file = folder / "report.html"
    file.write_text(html, encoding="utf-8")
    with Proxy() as proxy:
        options = [
            "--headless",
            "--no-sandbox",  # a container's root has none; the page is ours
            "--disable-gpu",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            f"--user-data-dir={folder / 'profile'}",
            f"--proxy-server=127.0.0.1:{proxy.server.server_address[1]}",
            "--proxy-bypass-list=<-loopback>",
            "--virtual-time-budget=3000",
            "--dump-dom",
        ]
        done = subprocess.run(
            [BROWSER, *options, file.as_uri()], capture_output=True, text=True, timeout=120, check=True
        )
        return done.stdout, proxy.of_the_page()


def test_a_browser_shows_the_report_and_asks_the_network_for_nothing(html: str, tmp_path: Path) -> None:
    dom, requested = browse(html, tmp_path)
    page = Page(dom)
    assert page.texts["verdict"] == "✓ Passed: this student can stand in for its guided teacher"
    assert len(page.named("img")) == 4
    assert len(page.named("svg")) == 5
    assert requested == []


def test_a_browser_would_be_caught_asking_and_the_policy_stops_it(html: str, tmp_path: Path) -> None:
    foreign = '<img src="http://example.com/x.png">'
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    assert browse(f"<!DOCTYPE html>{foreign}", tmp_path / "open")[1] == ["http://example.com/x.png"]
    assert browse(html.replace("</main>", f"{foreign}</main>"), tmp_path / "closed")[1] == []
