"""How the report writes numbers."""

from __future__ import annotations

import math

_MINUS = "\N{MINUS SIGN}"


def number(value: float | None, decimals: int | None) -> str:
    """With a typographic minus; ``decimals`` none is as many as needed, up to four digits."""
    if value is None or not math.isfinite(value):
        return "not measured"
    text = f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
    return text.replace("-", _MINUS) if float(text) else text.removeprefix("-")


def signed(value: float, decimals: int) -> str:
    """A difference."""
    text = number(value, decimals)
    return f"+{text}" if value > 0 and float(f"{value:.{decimals}f}") else text


def duration(seconds: float) -> str:
    """As a person says it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def gibibytes(count: int | None) -> str:
    """Bytes of memory."""
    return "not measured" if count is None else f"{count / 2**30:.2f} GiB"
