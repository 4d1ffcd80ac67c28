"""Progress of long work: a bar with rate and remaining time on a terminal, a line every few seconds elsewhere.

Under the pipeline a stage's output is a pipe, where a bar would be one line an update. The process that owns the
terminal names it in TEEFUSION_PROGRESS_TTY, and stages draw their bars there.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from types import TracebackType
from typing import IO, Any, Self

from tqdm import tqdm

log = logging.getLogger(__name__)
_LINE_EVERY_S = 5.0
_COLUMNS = 100  # of a terminal that does not say
TTY_VARIABLE = "TEEFUSION_PROGRESS_TTY"


class Progress:
    """``with Progress("targets", total=100, unit="trajectory") as p: p.advance(4, forwards=160)``.

    Extra counts given to ``advance`` are shown as rates a second.
    """

    def __init__(self, title: str, *, total: int, unit: str, enabled: bool = True) -> None:
        self._terminal = _terminal() if enabled else None
        self._enabled = enabled
        self._bar = tqdm(
            desc=title,
            total=total,
            unit=f" {unit}",
            file=self._terminal or sys.stderr,
            mininterval=0.2 if self._terminal else _LINE_EVERY_S,
            **_width(self._terminal),
            ascii=self._terminal is None,
            disable=self._terminal is None,  # without a terminal the lines below take the bar's place
        )
        self._title, self._total, self._unit = title, total, unit
        self._done, self._counts = 0, dict[str, float]()
        self._start = self._last_line = time.monotonic()

    def advance(self, count: int = 1, *, note: str = "", **counts: float) -> None:
        """Report ``count`` more units, and more of what else is counted."""
        self._done += count
        for name, value in counts.items():
            self._counts[name] = self._counts.get(name, 0) + value
        now = time.monotonic()
        rates = ", ".join(f"{v / max(now - self._start, 1e-9):.4g} {k}/s" for k, v in self._counts.items())
        text = ", ".join(part for part in (rates, note) if part)
        if self._terminal:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        elif self._enabled and (now - self._last_line >= _LINE_EVERY_S or self._done >= self._total):
            self._last_line = now
            self._line(now, text)

    def _line(self, now: float, text: str) -> None:
        elapsed = now - self._start
        left = elapsed / max(self._done, 1) * (self._total - self._done)
        rate = self._done / max(elapsed, 1e-9)
        more = f", {text}" if text else ""
        log.info(f"{self._title}: {self._done}/{self._total} {self._unit}, {rate:.3g}/s, {left:.0f} s left{more}")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._terminal and self._terminal is not sys.stderr:
            self._terminal.close()


def _width(terminal: IO[Any] | None) -> dict[str, Any]:
    """How wide the bar is. A terminal that does not know its size says 0, in which tqdm would draw nothing."""
    if terminal is None or os.get_terminal_size(terminal.fileno()).columns:
        return {"dynamic_ncols": terminal is not None}
    return {"ncols": _COLUMNS}


def _terminal() -> IO[Any] | None:
    """The terminal to draw on: standard error where it is one, else the one a parent process names."""
    if sys.stderr.isatty():
        return sys.stderr
    name = os.environ.get(TTY_VARIABLE)
    if name:
        with contextlib.suppress(OSError):
            return open(name, "w")
    return None
