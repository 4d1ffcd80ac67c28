"""The server, all of it together, until SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from teefusion.errors import SettingsError
from teefusion.serving.app import Parts, create_app
from teefusion.serving.batches import BatchQueue
from teefusion.serving.metrics import Metrics
from teefusion.serving.student import Post
from teefusion.settings import ServeSettings, Settings

log = logging.getLogger(__name__)
_LAST_ANSWERS_S = 5
_KEEP_ALIVE_S = 75  # longer than proxies keep idle connections, or they send requests into closed ones


class Server:
    """Serves the student at ``uri``. Its ``address`` is bound from the start; ``run`` answers there.

    Raises SettingsError where the address cannot be had.
    """

    def __init__(self, uri: str, settings: Settings) -> None:
        options, metrics = settings.serve, Metrics()
        self._queue = BatchQueue(max_batch=options.max_batch, max_waiting=options.max_waiting, metrics=metrics)
        self._post = Post(uri, settings, metrics)
        config = uvicorn.Config(
            create_app(Parts(options, self._post, self._queue, metrics)),
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(options.timeout_s) + _LAST_ANSWERS_S,
        )
        self._uvicorn = uvicorn.Server(config)
        self._socket = _listen(options)
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    def run(self) -> None:
        """Serve until SIGTERM, SIGINT or ``stop``, and answer what was asked until then.

        Raises what loading the first student raises.
        """
        with _on_sigterm(self.stop):
            asyncio.run(self._run())

    def stop(self) -> None:
        """Have ``run`` end; from any thread."""
        self._uvicorn.should_exit = True

    async def _run(self) -> None:
        def stop_if_failed(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and task.exception():
                self.stop()

        tasks = [asyncio.create_task(self._queue.run()), asyncio.create_task(self._post.hold())]
        for task in tasks:
            task.add_done_callback(stop_if_failed)
        log.info("listening on http://%s:%d", *self.address)
        await self._uvicorn.serve(sockets=[self._socket])
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, Exception):  # cancellation is none
                raise outcome


def _listen(options: ServeSettings) -> socket.socket:
    try:
        family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
        return socket.create_server((options.host, options.port), family=family)
    except OSError as error:
        raise SettingsError(
            f"Cannot listen on {options.host} port {options.port}: {error.strerror or error}. Set serve.host and "
            "serve.port to an address of this machine that is free."
        ) from error


@contextlib.contextmanager
def _on_sigterm(stop: Callable[[], None]) -> Iterator[None]:
    """Exit code 0 once it has drained: uvicorn raises the signal again then, as if it had not been heeded."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
