"""What doubles of HTTP servers share: serving in a thread, reading a request, answering it, breaking it off."""

from __future__ import annotations

import json
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit


class Double:
    """``with`` it serves at ``url``, on a free port, by a handler that knows it as its ``double``."""

    def __init__(self, handler: type[Handler]) -> None:
        bound = type("Handler", (handler,), {"double": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class Handler(BaseHTTPRequestHandler):
    """Of one connection: ``respond`` answers one request of any kind."""

    protocol_version = "HTTP/1.1"
    double: Any

    def do_GET(self) -> None:
        self.respond()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def respond(self) -> None:
        raise NotImplementedError

    def read(self) -> tuple[str, dict[str, str], bytes]:
        """The request's path, the first value of each field of its query, and its body."""
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        return url.path, query, self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, value: Any) -> None:
        """Plain text, or anything else as JSON."""
        plain = isinstance(value, str)
        data = (value if plain else json.dumps(value)).encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "text/plain" if plain else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def reset(self) -> None:
        """Close with RST: lingering for no time drops what is unsent."""
        self.wfile.flush()
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None:
        pass
