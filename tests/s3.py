"""A real S3 server over HTTP, in a process of its own, and a bad network in front of it."""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from tests.doubles import Double, Handler

ENVIRONMENT = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
BUCKET = "teefusion"


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """URL of moto's server with an empty bucket."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await_port(port)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("PUT", f"/{BUCKET}", headers={"Authorization": "AWS test:test"})
        assert connection.getresponse().status == 200
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    """One that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens on {port}")


class FaultProxy(Double):
    """Forwards HTTP to ``upstream``: some requests are answered 500 or 503, some connections are reset half-way.

    A reset comes before the request reaches the server, after it but before the answer, or within the answer's body:
    a client cannot tell these apart, as on a real network.
    """

    def __init__(self, upstream: str, *, errors: float, resets: float, latency_s: float = 0.0, seed: int = 0) -> None:
        self.upstream = upstream.removeprefix("http://")
        self.errors, self.resets, self.latency_s = errors, resets, latency_s
        self.requests = self.refused = self.broken = 0
        self._random, self._lock = random.Random(seed), threading.Lock()
        super().__init__(_Forwarder)

    def fate(self) -> str:
        """What becomes of the next request."""
        with self._lock:
            self.requests += 1
            draw, kind = self._random.random(), self._random.randrange(3)
            if draw < self.errors:
                self.refused += 1
                return ("500", "503", "503")[kind]
            if draw < self.errors + self.resets:
                self.broken += 1
                return ("reset before", "reset after", "reset within")[kind]
        return "forward"


class _Forwarder(Handler):
    double: FaultProxy

    def respond(self) -> None:
        body, fate = self._body(), self.double.fate()
        time.sleep(self.double.latency_s)
        if fate in ("500", "503"):
            self._answer(int(fate), {}, b"")
        elif fate == "reset before":
            self.reset()
        else:
            self._forward(body, fate)

    def _forward(self, body: bytes, fate: str) -> None:
        connection = http.client.HTTPConnection(self.double.upstream, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if fate == "reset after":
            self.reset()
            return
        self._answer(answer.status, dict(answer.getheaders()), data, half=fate == "reset within")

    def _answer(self, status: int, headers: dict[str, str], data: bytes, *, half: bool = False) -> None:
        self.send_response_only(status)
        hidden = ("transfer-encoding", "connection", "content-length")
        for name, value in headers.items():
            if name.lower() not in hidden:
                self.send_header(name, value)
        length = headers.get("Content-Length", str(len(data))) if self.command == "HEAD" else str(len(data))
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if half else data)
        if half:
            self.reset()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)
