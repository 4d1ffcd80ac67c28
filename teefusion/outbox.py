"""Records on their way to MLflow: sent by a thread, in order, and kept while the server is away.

MLflow's own asynchronous logging drops a batch whose request failed, and sends batches out of order.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)
_PAUSES_S = (1.0, 30.0)  # after a failure: the first, each next one twice as long, up to the last
_LAST_PAUSE_S = 0.5  # while somebody waits for the end


class Outbox:
    """Calls that a thread makes one after another, each again until it succeeds or the server refuses it."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[str, Callable[[], object]]] = deque()
        self._refused: list[str] = []
        self._changed = threading.Condition()
        self._closing = False
        self._away_since = 0.0
        self._thread: threading.Thread | None = None

    def put(self, what: str, send: Callable[[], object]) -> None:
        """Have ``send`` called, soon; ``what`` names it in messages. Never waits."""
        with self._changed:
            self._waiting.append((what, send))
            self._changed.notify_all()
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="outbox", daemon=True)
            self._thread.start()

    def close(self, patience_s: float) -> list[str]:
        """Wait until all is sent, so many seconds at most; return the names of what was refused or is still here."""
        if self._thread is None:
            return []
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._waiting, timeout=patience_s)
            left = [what for what, _ in self._waiting]
            self._waiting.clear()
        return [*self._refused, *left]

    def _work(self) -> None:
        pause = _PAUSES_S[0]
        while (record := self._next()) is not None:
            what, send = record
            try:
                send()
            except Exception as error:  # whatever a tracking server does, it must not stop what it tracks
                if _is_passing(error):
                    self._rest(pause, error)
                    pause = min(2 * pause, _PAUSES_S[1])
                    continue
                log.warning("MLflow refused %s (%s); going on without.", what, error)
                self._refused.append(what)
            if self._away_since:
                log.info("MLflow takes records again, after %.0f s.", time.monotonic() - self._away_since)
            pause, self._away_since = _PAUSES_S[0], 0.0
            with self._changed:
                if self._waiting:  # else ``close`` gave up meanwhile
                    self._waiting.popleft()
                self._changed.notify_all()

    def _next(self) -> tuple[str, Callable[[], object]] | None:
        """The oldest record, once there is one; none when all is sent and nothing more comes."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            return self._waiting[0] if self._waiting else None

    def _rest(self, pause: float, error: Exception) -> None:
        if not self._away_since:
            self._away_since = time.monotonic()
            log.warning("MLflow does not take records (%s); they are kept, and sent when it does.", error)
        with self._changed:
            closing = self._changed.wait_for(lambda: self._closing, timeout=pause)
        if closing:
            time.sleep(_LAST_PAUSE_S)


def _is_passing(error: Exception) -> bool:
    """Whether the same record may be taken later: the server is away, overloaded or locked."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        status = int(error.get_http_status_code())
        return status >= 500 or status == 429
    return not isinstance(error, TypeError | ValueError)
