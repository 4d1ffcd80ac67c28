"""The report: what a reader finds where, that it holds no foreign markup and loads nothing, and a browser's view."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
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

import numpy as np
import pytest
from PIL import Image

from teefusion.gate import Verdict
from teefusion.group_means import OVERALL, BenchmarkScore, Mean, benchmark_score
from teefusion.intervals import Interval
from teefusion.report import (
    ControlPoint,
    Pairing,
    PictureSet,
    ReportData,
    ResidualBucket,
    Row,
    SigmaBucket,
    StageTime,
    SweptPictures,
    Timing,
    render_report,
)
from teefusion.report.pictures import BUDGET_BYTES, data_uris

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "br", "input"}


def png(color: str, side: int = 8) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (side, side), color).save(stream, "PNG")
    return stream.getvalue()


def interval(difference: float, low: float, high: float, margin: float) -> Interval:
    return Interval(40, 20.0, 20.0 + difference, difference, low, high, margin)


INTERVALS = {
    OVERALL: interval(-0.1, -0.19, 0.02, 0.2),
    "anime": interval(-0.25, -0.3, 0.14, 0.6),
    "photo": interval(0.05, -0.2, 0.31, 0.6),
}


def scores(mean: float) -> dict[str, Mean]:
    return {style: Mean(mean, 0.25, 80 if style == OVERALL else 40) for style in (OVERALL, "anime", "photo")}


ROWS = {
    "unguided": Row("Unguided", "unguided", scores(15.0), nfe=20.0),
    "teacher": Row(
        "Teacher",
        "teacher",
        scores(20.0),
        guidance_scale=4.0,
        nfe=40.0,
        seconds=Timing(0.24, 0.23, 0.27),
        diversity=Mean(0.5, 0.01, 16),
    ),
    "student": Row(
        "Student",
        "student",
        scores(19.9),
        guidance_scale=4.0,
        nfe=20.0,
        seconds=Timing(0.125),
        peak_bytes=3 << 29,
        diversity=Mean(0.45, 0.02, 16),
    ),
}


def rows(**changes: object) -> dict[str, Row]:
    """All of them, changed alike."""
    return {name: dataclasses.replace(row, **changes) for name, row in ROWS.items()}  # type: ignore[arg-type]


def report_data(**changes: object) -> ReportData:
    """A student that passed, in two styles, with everything a report can show."""
    base = ReportData(
        key="0123456789abcdef",
        teacher="shapes",
        about="The teacher shapes samples with euler_cfg.",
        scorer="bundled:shapes",
        verdict=Verdict("passed", ("Overall it holds.", "No style falls behind."), INTERVALS),
        rows=ROWS,
        pairings=[Pairing("student minus teacher", INTERVALS)],
        memory_kind="resident in the process",
        guidance_residual=0.117,
        control={
            row: [ControlPoint(s, Mean(18.0 + s, 0.1, 16), Mean(0.5, 0.02, 16)) for s in (1.0, 4.0)]
            for row in ("teacher", "student")
        },
        residual_by_sigma=[SigmaBucket(0.5, 1, [ResidualBucket(1, 4, 0.375), ResidualBucket(4, 7, 0.25)])],
        residual_curve=[(0, 1.0), (100, 0.4), (200, 0.117)],
        residual_by_guidance=[ResidualBucket(1, 4, 0.2), ResidualBucket(4, 7, 0.1)],
        loss_curve=[(10, 0.5), (200, 0.02)],
        pictures=[
            PictureSet(
                "a red star", "anime", {"unguided": png("black"), "teacher": png("red"), "student": png("orange")}
            )
        ],
        swept=[
            SweptPictures(
                "a red star",
                "anime",
                {
                    "teacher": {1.0: png("black"), 4.0: png("red")},
                    "student": {1.0: png("navy"), 4.0: png("orange")},
                },
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
    names = ("verdict", "numbers", "pictures", "guidance", "training", "details")
    order = [html.index(f'id="{name}"') for name in names]
    assert order == sorted(order)


def test_a_failed_verdict_says_so_in_words_and_is_no_pass() -> None:
    failed = Verdict("failed", ("Style photo: too low.",), {OVERALL: interval(-1, -1.5, -0.5, 0.2)})
    html = render_report(report_data(verdict=failed, pairings=[Pairing("student minus teacher", failed.intervals)]))
    page = Page(html)
    assert page.texts["verdict"] == "✗ Not passed: this student cannot stand in for its guided teacher"
    assert page.texts["reasons"] == "Style photo: too low."
    assert "Passed:" not in html
    assert "It is not registered." in words(html)
    assert "✗ no" in page.texts["differences"]
    assert "✓ yes" not in page.texts["differences"]


def test_the_headline_numbers_are_worked_out_from_the_measurements(html: str) -> None:
    text = words(html)
    assert "40 → 20 Evaluations of the transformer, teacher → student: 50 % of the teacher's." in text
    assert "Diversity 0.90× How much" in text  # 0.45 / 0.5
    assert "1.92× Teacher 0.240 s a picture (0.230 to 0.270). Student 0.125 s a picture." in text  # 0.24 / 0.125
    assert "Guidance adds 5.00 points to the teacher; the student keeps 98 % of that." in text  # 4.9 of 5
    assert "Guidance residual 0.117" in text
    assert "−0.10 95 % interval −0.19 to +0.02; down to −0.20 is allowed." in text


def test_too_few_prompts_are_told_from_a_bad_student() -> None:
    page = Page(render_report(report_data(verdict=Verdict("not enough evidence", ("12 prompts.",), INTERVALS))))
    assert page.texts["verdict"].startswith("? Not enough evidence: too few prompts to tell")
    assert "Nothing here says that it is bad" in words(
        render_report(report_data(verdict=Verdict("not enough evidence", ())))
    )


def test_a_comparison_that_decides_nothing_has_no_verdict_and_any_rows() -> None:
    renamed = {
        "A": dataclasses.replace(ROWS["teacher"], title="A"),
        "B": dataclasses.replace(ROWS["student"], title="B"),
    }
    html = render_report(
        ReportData(key="k", scorer="s", rows=renamed, pairings=[Pairing("B minus A", INTERVALS)], about="Two students.")
    )
    page = Page(html)
    assert page.texts["verdict"] == "≈ Comparison"
    assert "reasons" not in page.texts
    assert "Style A B Prompts overall 20.00 ± 0.25 19.90 ± 0.25 80" in page.texts["scores"]
    assert page.texts["differences"].startswith("B minus A, prompt by prompt.")
    assert not page.mistakes


def test_the_tables_give_scores_differences_and_costs(page: Page) -> None:
    assert "anime 15.00 ± 0.25 20.00 ± 0.25 19.90 ± 0.25 40 photo" in page.texts["scores"]
    assert "anime −0.25 −0.30 to +0.14 −0.60 ✓ yes 40 photo" in page.texts["differences"]
    assert "Memory is the most resident in the process while the row drew" in page.texts["costs"]
    assert "Teacher 4 40 0.240 0.230 to 0.270 0.500 ± 0.010" in page.texts["costs"]
    assert "Student 4 20 0.125 1.50 GiB 0.450 ± 0.020" in page.texts["costs"]
    assert "4 22.00 ± 0.10 0.500 ± 0.020 22.00 ± 0.10 0.500 ± 0.020 16" in page.texts["control"]


def test_a_champion_has_differences_of_its_own() -> None:
    both = [Pairing("student minus teacher", INTERVALS), Pairing("student minus champion", INTERVALS)]
    page = Page(render_report(report_data(pairings=both)))
    assert page.texts["differences1"].startswith("Student minus champion, prompt by prompt.")
    assert {"chart-differences", "chart-differences1"} <= {a.get("id") for a in page.named("figure")}


def test_the_benchmarks_number_is_shown_where_there_are_several_groups() -> None:
    several = benchmark_score({"anime": [14.0] * 80 + [16.0] * 80, "photo": [20.0] * 80})
    single = benchmark_score({"anime": [14.0] * 80})
    assert several is not None
    assert single is not None

    def with_benchmark(score: BenchmarkScore) -> dict[str, Row]:
        return ROWS | {name: dataclasses.replace(ROWS[name], benchmark=score) for name in ("teacher", "student")}

    shown = Page(render_report(report_data(rows=with_benchmark(several))))
    text = shown.texts["benchmark"]
    assert "means of groups of 80 prompts" in text
    assert "anime 15.00 ± 1.00 15.00 ± 1.00 2" in text
    assert "photo 20.00 20.00 1" in text  # of one group there is no deviation
    assert "average 16.67 16.67" in text
    assert not shown.unclosed
    assert not shown.mistakes
    assert "benchmark" not in Page(render_report(report_data(rows=with_benchmark(single)))).texts


def test_what_the_scorer_is_stands_in_the_details() -> None:
    described = {"name": "HPS v2.1", "version": "v2.1", "revision": None, "preprocessing": {"antialias": False}}
    html = render_report(report_data(scorer="HPS v2.1", scorer_details=described))
    assert "<summary>Scorer</summary>" in html
    assert '<th scope="row">preprocessing.antialias</th><td class="mono">False</td>' in html
    assert "revision" not in html


def test_what_guidance_adds_is_left_out_where_it_adds_nothing() -> None:
    assert "Guidance adds" not in words(render_report(report_data(rows=rows(scores={OVERALL: Mean(20.0, 0.25, 80)}))))


def shown_pictures(page: Page) -> list[dict[str, str]]:
    """Without the viewer's own."""
    return [picture for picture in page.named("img") if "data-part" not in picture]


def test_pictures_stand_in_a_row_and_by_scale_and_say_what_they_are(page: Page) -> None:
    pictures = shown_pictures(page)
    assert [picture["alt"] for picture in pictures] == [
        "a red star: Unguided",
        "a red star: Teacher",
        "a red star: Student",
        "a red star: Teacher, s = 1",
        "a red star: Teacher, s = 4",
        "a red star: Student, s = 1",
        "a red star: Student, s = 4",
    ]
    colors = [png(color) for color in ("black", "red", "orange", "black", "red", "navy", "orange")]
    assert [base64.b64decode(picture["src"].removeprefix("data:image/png;base64,")) for picture in pictures] == colors


def test_every_picture_opens_by_a_button_that_says_so(page: Page) -> None:
    labels = [button.get("aria-label") for button in page.named("button") if "data-name" in button]
    assert len(labels) == 7
    assert labels[2] == "Open: a red star, Student"


def test_a_scale_that_one_row_lacks_leaves_its_place_empty() -> None:
    swept = dataclasses.replace(
        report_data().swept[0], pictures={"teacher": {4.0: png("red")}, "student": {1.0: png("navy")}}
    )
    page = Page(render_report(report_data(swept=[swept], pictures=())))
    assert [picture["alt"] for picture in shown_pictures(page)] == [
        "a red star: Teacher, s = 4",
        "a red star: Student, s = 1",
    ]


def noise(side: int, seed: int) -> bytes:
    """A picture that hardly compresses."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    return stream.getvalue()


def test_small_pictures_stay_as_they_are_and_many_large_ones_shrink_into_the_budget() -> None:
    few = [noise(64, seed) for seed in range(8)]
    assert [base64.b64decode(uri.partition(",")[2]) for uri in data_uris(few).values()] == few
    many = [noise(400, seed) for seed in range(2)]  # 960 kB as they are
    uris = data_uris(many, budget=100_000).values()
    encoded = [base64.b64decode(uri.removeprefix("data:image/webp;base64,")) for uri in uris]
    assert sum(map(len, encoded)) <= 100_000
    sides = set()
    for data in encoded:
        with Image.open(io.BytesIO(data)) as image:
            sides.add(image.size)
    assert len(sides) == 1  # all alike, so that rows compare
    assert BUDGET_BYTES * 4 / 3 + 300_000 < 10_000_000  # base64, and the page around them


def test_details_hold_stages_settings_digests_and_versions(html: str, page: Page) -> None:
    assert page.texts["stages"] == "targets 1 min 15 s, reused train 1 h 2 min"
    text = words(html)
    for fact in ("train.steps 600", "evaluate.scorer bundled:shapes", "torch 2.13.0", "prompts " + "ab" * 32):
        assert fact in text
    assert "run 0123456789abcdef model teefusion-shapes, version 3 2025-11-21 10:40 UTC" in text


# Charts


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


def test_the_same_data_gives_the_same_bytes(html: str) -> None:
    assert render_report(report_data()) == html


# What it must not hold


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
    assert len(shown_pictures(page)) == 1
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


def test_a_report_of_a_student_that_could_not_be_measured_still_reads() -> None:
    verdict = Verdict("failed", ("Nothing was measured.",))
    bare = ReportData(key="k", teacher="shapes", scorer="none", verdict=verdict, rows={}, guidance_residual=math.nan)
    html = render_report(bare)
    assert Page(html).texts["reasons"] == "Nothing was measured."
    assert words(html).count("not measured") == 5
    assert "nan" not in words(html)


@pytest.mark.parametrize(("mean", "shown"), [(31.23456, "31.23"), (2.34567, "2.346"), (0.61234, "0.6123")])
def test_scores_have_as_many_decimals_as_their_size_asks_for(mean: float, shown: str) -> None:
    html = render_report(report_data(rows=rows(scores={OVERALL: Mean(mean, 0.1, 40)}), control={}))
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
    assert len(shown_pictures(page)) == 7
    assert len(page.named("svg")) == 9
    assert requested == []


def test_a_browser_would_be_caught_asking_and_the_policy_stops_it(html: str, tmp_path: Path) -> None:
    foreign = '<img src="http://example.com/x.png">'
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    assert browse(f"<!DOCTYPE html>{foreign}", tmp_path / "open")[1] == ["http://example.com/x.png"]
    assert browse(html.replace("</main>", f"{foreign}</main>"), tmp_path / "closed")[1] == []


def acting(html: str, action: str) -> str:
    """The page with an action appended to its script, which the policy then allows."""
    script = html.split("<script>")[1].split("</script>")[0]
    digest, changed = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, script + action)
    )
    return html.replace(digest, changed).replace(script, script + action)


def test_the_viewer_opens_a_picture_beside_its_partner_with_a_slider_between(html: str, tmp_path: Path) -> None:
    action = """
      document.querySelector('button[data-name="Student"]').click();
      const slider = document.querySelector('[data-part="split"]');
      slider.value = 30;
      slider.dispatchEvent(new Event("input"));
    """
    page = Page(browse(acting(html, action), tmp_path)[0])
    (viewer,) = page.named("dialog")
    assert "open" in viewer
    assert viewer["style"] == "--split: 30%;"
    under, over = (next(a for a in page.named("img") if a.get("data-part") == part) for part in ("under", "over"))
    assert over["alt"] == "a red star: Teacher"  # the left one, up to the handle
    assert under["alt"] == "a red star: Student"
    assert page.texts["viewer-prompt"] == "a red star"


def test_in_the_sweep_the_viewer_holds_rows_against_each_other_at_the_same_scale(html: str, tmp_path: Path) -> None:
    action = """
      document.querySelector('button[data-name="Student, s = 4"]').click();
      document.body.dataset.opened = document.querySelector('[data-part="over"]').alt;
      document.querySelector('[data-part="next"]').click();  // once round, as there are two figures
    """
    page = Page(browse(acting(html, action), tmp_path)[0])
    (body,) = page.named("body")
    assert body["data-opened"] == "a red star: Teacher, s = 4"
    alts = {a["data-part"]: a["alt"] for a in page.named("img") if "data-part" in a}
    assert alts == {"over": "a red star: Unguided", "under": "a red star: Teacher"}
