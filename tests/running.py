"""A server of ours in a thread of this process, and what tests ask of it."""

from __future__ import annotations

import base64
import contextlib
import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import requests
from PIL import Image

from teefusion.serving.server import Server
from teefusion.settings import Settings, load_settings


def serve_settings(workdir: Path, **options: Any) -> Settings:
    """Settings of a server on a free port of this machine, with these of ``serve``."""
    values = {"port": 0, "num_steps": 2, "follow_s": 0.05} | options
    overrides = {"workdir": workdir, "device": "cpu"} | {f"serve.{name}": value for name, value in values.items()}
    return load_settings(overrides=overrides)


@contextlib.contextmanager
def running(uri: str | Path, settings: Settings, *, ready: bool = True) -> Iterator[str]:
    """The URL of a server of ``uri``, once it is ready; stopped after the block."""
    server = Server(str(uri), settings)
    raised: list[BaseException] = []

    def run() -> None:
        try:
            server.run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.address[1]}"
    try:
        if ready:
            wait(lambda: bool(raised) or requests.get(f"{url}/readyz", timeout=10).ok)
        yield url
    finally:
        server.stop()
        thread.join(60)
    if raised:
        raise raised[0]


def wait(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until the condition holds. Raises AssertionError if it does not in time; no answer is a no."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.ConnectionError):
            if condition():
                return
        time.sleep(0.01)
    raise AssertionError(f"not within {seconds} s")


def ask(url: str, body: dict[str, Any] | str | bytes, **options: Any) -> requests.Response:
    """POST to the generations route."""
    options.setdefault("timeout", 60)
    how = {"json": body} if isinstance(body, dict) else {"data": body}
    return requests.post(f"{url}/v1/images/generations", **how, **options)


def pictures(answer: requests.Response) -> list[Image.Image]:
    """The pictures of an answer."""
    assert answer.status_code == 200, answer.text
    return [Image.open(io.BytesIO(base64.b64decode(item["b64_json"]))) for item in answer.json()["data"]]


def metric(url: str, name: str) -> float:
    """A metric's value, 0 where it was never counted."""
    text = requests.get(f"{url}/metrics", timeout=10).text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, flags=re.MULTILINE)
    return float(found[1]) if found else 0.0
