"""The server's page in a browser: type, slide, draw, see a picture; by keys alone, on a phone, in the dark."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from PIL import Image

from tests.browser import Browser
from tests.running import ask, pictures, running, serve_settings

PICTURE = "document.getElementById('picture')"


@pytest.fixture(scope="module")
def url(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running(tiny_student, serve_settings(tmp_path_factory.mktemp("page"))) as address:
        yield address


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


def text(browser: Browser, name: str) -> str:
    """What an element shows, in one line."""
    return " ".join(str(browser.read(f"document.getElementById('{name}').innerText")).split())


def begin(browser: Browser, url: str) -> None:
    browser.messages.clear()
    browser.open(url)
    browser.wait("document.getElementById('about') && !document.getElementById('about').hidden")


def test_a_person_types_slides_draws_and_sees_the_picture_beside_its_settings(browser: Browser, url: str) -> None:
    begin(browser, url)
    browser.click("#prompt")
    browser.type("a red <b>star</b>")
    browser.click("#guidance")  # its middle: 5.5
    browser.press("ArrowLeft", times=10)
    assert text(browser, "guidance-value") == "4.5"
    browser.click("#seed")
    browser.type("7")
    browser.click("#draw")
    browser.wait(f"!{PICTURE}.hidden && {PICTURE}.complete && {PICTURE}.naturalWidth == 16")
    shown = base64.b64decode(browser.read(f"{PICTURE}.src").partition(",")[2])
    (expected,) = pictures(ask(url, {"prompt": "a red <b>star</b>", "guidance_scale": 4.5, "seed": 7}))
    assert Image.open(io.BytesIO(shown)).tobytes() == expected.tobytes()
    assert text(browser, "caption") == "a red <b>star</b>"
    made = r"Student tiny-student0/student Guidance scale 4.5 Steps 2 Seed 7 Size 16x16 Took [0-9.]+ s"
    assert re.fullmatch(made, text(browser, "made"))
    assert "Guidance trained 1 to 5" in text(browser, "card")
    assert browser.messages == []


def test_the_keyboard_alone_is_enough(browser: Browser, url: str) -> None:
    begin(browser, url)
    assert browser.read("document.activeElement.id") == "prompt"
    browser.type("a moon")
    browser.press("Tab")
    browser.press("ArrowRight", times=15)
    assert text(browser, "guidance-value") == "5.5"
    assert "expect worse pictures" in text(browser, "range")
    browser.press("Tab", times=3)
    assert browser.read("document.activeElement.id") == "draw"
    browser.press("Enter")
    browser.wait(f"!{PICTURE}.hidden")
    assert browser.read(f"{PICTURE}.alt") == "a moon"


def test_a_refusal_is_shown_and_the_next_request_is_not_hindered(browser: Browser, url: str) -> None:
    begin(browser, url)
    browser.type("a" * 2001)
    browser.press("Enter", control=True)
    browser.wait("!document.getElementById('error').hidden")
    assert "at most 2000 characters" in text(browser, "error")
    browser.read("document.getElementById('prompt').value = 'a'")
    browser.press("Enter", control=True)
    browser.wait(f"!{PICTURE}.hidden && document.getElementById('error').hidden")


def test_a_server_with_a_key_has_the_page_ask_for_it(browser: Browser, tiny_student: Path, tmp_path: Path) -> None:
    with running(tiny_student, serve_settings(tmp_path, api_key="sesame")) as url:
        browser.open(url)
        browser.wait("document.activeElement && document.activeElement.id == 'key'")
        assert "asks for its API key" in text(browser, "error")
        browser.type("sesame")
        browser.press("Tab")
        browser.wait("!document.getElementById('about').hidden")
        browser.click("#prompt")
        browser.type("a")
        browser.click("#draw")
        browser.wait(f"!{PICTURE}.hidden")
        assert browser.read("document.getElementById('error').hidden")


@pytest.mark.parametrize(("width", "dark"), [(1100, False), (1100, True), (360, False), (360, True)])
def test_it_fits_wide_and_narrow_screens_in_both_schemes(
    browser: Browser, url: str, tmp_path: Path, width: int, dark: bool
) -> None:
    begin(browser, url)
    browser.look(tmp_path / "page.png", width=width, height=800, dark=dark)
    assert browser.read("document.documentElement.scrollWidth") <= width
    red, green, blue = Image.open(tmp_path / "page.png").convert("RGB").getpixel((2, 400))
    assert (red + green + blue < 150) is dark


def test_the_page_is_self_contained_and_its_policy_lets_nothing_else_in(url: str) -> None:
    answer = requests.get(url, timeout=10)
    assert not re.search(r"(src|href)=\"(?!data:)", answer.text)
    assert "@import" not in answer.text
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert re.search(r"script-src 'sha256-[A-Za-z0-9+/=]{44}';", policy)
