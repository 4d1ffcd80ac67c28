"""The report in headless Chromium: what it loads, how it is used, and that it fits a phone."""

from __future__ import annotations

import re
import socketserver
import subprocess
import threading
from pathlib import Path

import pytest

from tests.browser import BROWSER, OPTIONS, Browser
from tests.reports import Page


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
            *OPTIONS,
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
    assert len(page.pictures()) == 7
    assert len(page.named("svg")) == 9
    assert requested == []


def test_a_browser_would_be_caught_asking_and_the_policy_stops_it(html: str, tmp_path: Path) -> None:
    foreign = '<img src="http://example.com/x.png">'
    (tmp_path / "open").mkdir()
    (tmp_path / "closed").mkdir()
    assert browse(f"<!DOCTYPE html>{foreign}", tmp_path / "open")[1] == ["http://example.com/x.png"]
    assert browse(html.replace("</main>", f"{foreign}</main>"), tmp_path / "closed")[1] == []


def opened(html: str, folder: Path, browser: Browser) -> None:
    (folder / "report.html").write_text(html, encoding="utf-8")
    browser.open((folder / "report.html").as_uri())
    browser.wait("document.readyState == 'complete' && !!document.querySelector('#viewer')")


def test_the_viewer_works_by_keyboard(html: str, tmp_path: Path) -> None:
    part = "document.querySelector('[data-part={}]')".format
    with Browser(tmp_path) as browser:
        opened(html, tmp_path, browser)
        browser.read("document.querySelector('button[data-name=Student]').focus()")
        browser.press("Enter")
        browser.wait("document.querySelector('#viewer').open")
        assert browser.read(f"{part('over')}.alt") == "a red star: Teacher"  # the left one, up to the handle
        assert browser.read(f"{part('under')}.alt") == "a red star: Student"
        assert browser.read("document.querySelector('#viewer-prompt').textContent") == "a red star"
        browser.read(f"{part('split')}.focus()")
        before = browser.read(f"+{part('split')}.value")
        browser.press("ArrowLeft", times=3)
        assert browser.read(f"+{part('split')}.value") < before
        assert browser.read("document.querySelector('#viewer').style.getPropertyValue('--split')") == (
            browser.read(f"{part('split')}.value") + "%"
        )
        browser.press("Escape")
        browser.wait("!document.querySelector('#viewer').open")
        assert browser.messages == []


def test_in_the_sweep_the_viewer_holds_rows_against_each_other_at_the_same_scale(html: str, tmp_path: Path) -> None:
    shown = "[...document.querySelectorAll('#viewer img')].map(image => image.alt).sort().join()"
    with Browser(tmp_path) as browser:
        opened(html, tmp_path, browser)
        browser.click('button[data-name="Student, s = 4"]')
        assert browser.read(shown) == "a red star: Student, s = 4,a red star: Teacher, s = 4"
        browser.click('[data-part="next"]')  # once round, as there are two figures
        assert browser.read(shown) == "a red star: Teacher,a red star: Unguided"


@pytest.mark.parametrize("dark", [False, True])
def test_it_fits_a_phone_in_both_colour_schemes(html: str, tmp_path: Path, dark: bool) -> None:
    with Browser(tmp_path) as browser:
        opened(html, tmp_path, browser)
        browser.look(tmp_path / "phone.png", width=390, height=844, dark=dark)
        assert browser.read("document.documentElement.scrollWidth") == 390
        page = browser.read("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", page))) < 384) is dark
