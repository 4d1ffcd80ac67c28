"""The server, all of it together, until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Iterator

import uvicorn

from teefusion.errors import SettingsError
from teefusion.serving.app import Parts, create_app
from teefusion.serving.batches import BatchQueue
from teefusion.serving.metrics import Metrics
from teefusion.serving.student import Post
from teefusion.settings import Settings

log = logging.getLogger(__name__)
_LAST_ANSWERS_S = 5


class Server:
    """Serves the student at ``uri``. ``address`` is bound, so that it is known, before ``run`` answers there.

    Raises SettingsError where the address cannot be had.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        self._uri, self._settings, options = uri, settings, settings.serve
        try:
            family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
            self._socket = socket.create_server((options.host, options.port), family=family)
        except OSError as error:
            raise SettingsError(
                f"Cannot listen on {options.host} port {options.port}: {error.strerror or error}. Set serve.host and "
                "serve.port to an address of this machine that is free."
            ) from error
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._uvicorn: uvicorn.Server | None = None

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or ``stop``, and answer what was asked until then.

        Raises what loading the first student raises.
        """
        with _ends_well_by_sigterm():
            asyncio.run(self._run())

    def stop(self) -> None:
        """Have ``run`` end as by SIGTERM; for another thread."""
        if self._uvicorn is not None:
            self._uvicorn.should_exit = True

    async def _run(self) -> None:
        options, metrics = self._settings.serve, Metrics()
        queue = BatchQueue(max_batch=options.max_batch, max_waiting=options.max_waiting, metrics=metrics)
        post = Post(self._uri, self._settings, metrics)
        config = uvicorn.Config(
            create_app(Parts(options, post, queue, metrics)),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=int(options.timeout_s) + _LAST_ANSWERS_S,
        )
        self._uvicorn = server = uvicorn.Server(config)

        def stop_if_failed(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception():
                server.should_exit = True

        tasks = [asyncio.create_task(queue.run()), asyncio.create_task(post.hold())]
        for task in tasks:
            task.add_done_callback(stop_if_failed)
        log.info("listening on http://%s:%d", *self.address)
        await server.serve(sockets=[self._socket])
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):  # cancellation is none
                raise outcome


@contextlib.contextmanager
def _ends_well_by_sigterm() -> Iterator[None]:
    """Exit code 0 once it has drained: uvicorn raises the signal again, as if it had not been heeded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
