"""A report's data with everything in it, and its page as a reader finds it."""

from __future__ import annotations

import dataclasses
import io
import re
from html import unescape
from html.parser import HTMLParser

from PIL import Image

from teefusion.gate import Verdict
from teefusion.group_means import OVERALL, Mean
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
)

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

    def pictures(self) -> list[dict[str, str]]:
        """All but the viewer's own."""
        return [picture for picture in self.named("img") if "data-part" not in picture]


def words(html: str) -> str:
    """The page's text, without markup."""
    body = html.split("<body>", 1)[1]
    return " ".join(unescape(re.sub(r"<svg.*?</svg>|<[^>]+>", " ", body, flags=re.DOTALL)).split())
