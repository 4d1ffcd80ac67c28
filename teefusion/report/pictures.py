"""Pictures as data URIs, as good as a report of bounded size allows."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence

from PIL import Image

BUDGET_BYTES = 7_000_000
"""Of all pictures together, before base64 adds a third: a report stays below 10 MB."""
# (pixels of the longest side, WebP quality), tried until all fit; None is the picture as it is.
_LADDER: Sequence[tuple[int, int] | None] = (None, (1024, 85), (768, 80), (512, 80), (384, 75), (256, 70), (128, 60))


def data_uris(pictures: Iterable[bytes], *, budget: int = BUDGET_BYTES) -> dict[bytes, str]:
    """A data URI for each picture, all by the first rung of the ladder that keeps them within the budget."""
    distinct = list(dict.fromkeys(pictures))
    for rung in _LADDER:
        encoded: dict[bytes, str] = {}
        left = budget
        for picture in distinct:
            media, data = _encode(picture, rung)
            encoded[picture] = f"data:{media};base64,{base64.b64encode(data).decode()}"
            left -= len(data)
            if left < 0 and rung != _LADDER[-1]:
                break
        else:
            break
    return encoded


def longest_side(picture: bytes) -> int:
    """Pixels."""
    with Image.open(io.BytesIO(picture)) as image:
        return max(image.size)


def _encode(picture: bytes, rung: tuple[int, int] | None) -> tuple[str, bytes]:
    """Media type and bytes."""
    with Image.open(io.BytesIO(picture)) as image:
        if rung is None:
            return Image.MIME[image.format or "PNG"], picture
        side, quality = rung
        shown = image.convert("RGB")
        shown.thumbnail((side, side))
    stream = io.BytesIO()
    shown.save(stream, "WEBP", quality=quality)
    return "image/webp", stream.getvalue()
