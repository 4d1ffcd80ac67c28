"""A headless Chromium that a test drives as a person does: keys, pointer, a look at the screen."""

from __future__ import annotations

import base64
import itertools
import json
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import requests
import websocket

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

OPTIONS = (
    "--headless",
    "--no-sandbox",  # a container's root has none; the page is ours
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
)


class Browser:
    """``with Browser(folder) as browser``: one page, over the DevTools protocol. Skips the test without Chromium."""

    def __init__(self, folder: Path, *, width: int = 1100, height: int = 900) -> None:
        if BROWSER is None:
            pytest.skip("no Chromium here: apt-get install chromium")
        options = [
            *OPTIONS,
            "--remote-debugging-port=0",
            "--remote-allow-origins=*",
            f"--user-data-dir={folder / 'profile'}",
            f"--window-size={width},{height}",
        ]
        self._process = subprocess.Popen([BROWSER, *options, "about:blank"], stderr=subprocess.DEVNULL)
        self._port_file = folder / "profile" / "DevToolsActivePort"
        self._numbers = itertools.count(1)
        self.messages: list[str] = []
        """What the console was told, and what went wrong."""

    def __enter__(self) -> Self:
        deadline = time.monotonic() + 60
        while not (self._port_file.exists() and self._port_file.read_text().count("\n")):
            assert time.monotonic() < deadline, "Chromium does not start"
            time.sleep(0.05)
        port = self._port_file.read_text().partition("\n")[0]
        pages = requests.get(f"http://127.0.0.1:{port}/json/list", timeout=30).json()
        page = next(target for target in pages if target["type"] == "page")
        self._socket = websocket.create_connection(page["webSocketDebuggerUrl"], timeout=60)
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()
        self._process.terminate()
        self._process.wait(30)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command of the protocol, and its result."""
        number = next(self._numbers)
        self._socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") == number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result
            if message["method"] in ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                self.messages.append(json.dumps(message["params"]))

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def read(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def wait(self, expression: str, seconds: float = 60) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + seconds
        while not self.read(expression):
            assert time.monotonic() < deadline, f"never: {expression}"
            time.sleep(0.05)

    def type(self, text: str) -> None:
        """Into what has the focus."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, times: int = 1, control: bool = False) -> None:
        """Tab, Enter, Escape or an arrow."""
        codes = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}
        event = {"key": key, "code": key, "windowsVirtualKeyCode": codes[key], "modifiers": 2 if control else 0}
        down = {"type": "rawKeyDown"} if key != "Enter" or control else {"type": "keyDown", "text": "\r"}
        for _ in range(times):
            self.call("Input.dispatchKeyEvent", **down, **event)
            self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector: str) -> None:
        """The middle of an element."""
        x, y = self.read(
            f"(() => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}}); "
            "const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def look(self, path: Path, *, width: int = 1100, height: int = 900, dark: bool = False) -> None:
        """A screenshot of the whole page on a screen of this size and colour scheme."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        picture = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(picture))
