"""The pictures: which stand where, what they are called, and how many bytes they take."""

from __future__ import annotations

import base64
import dataclasses
import io

import numpy as np
from PIL import Image

from teefusion.report import render_report
from teefusion.report.pictures import BUDGET_BYTES, data_uris
from tests.reports import Page, png, report_data


def test_pictures_stand_in_a_row_and_by_scale_and_say_what_they_are(page: Page) -> None:
    pictures = page.pictures()
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
    assert [picture["alt"] for picture in page.pictures()] == [
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
