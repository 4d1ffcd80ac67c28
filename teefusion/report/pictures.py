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
_SAMPLE = 24


def data_uris(pictures: Iterable[bytes], *, budget: int = BUDGET_BYTES) -> dict[bytes, str]:
    """A data URI for each picture, all by the first rung of the ladder that keeps them within the budget."""
    distinct = list(dict.fromkeys(pictures))
    encoded: dict[bytes, tuple[str, bytes]] = {}
    for rung in _LADDER:
        if rung != _LADDER[-1] and _estimate(distinct, rung) > budget:
            continue
        encoded = {picture: _encode(picture, rung) for picture in distinct}
        if sum(len(data) for _, data in encoded.values()) <= budget:
            break
    return {
        picture: f"data:{media};base64,{base64.b64encode(data).decode()}" for picture, (media, data) in encoded.items()
    }


def _estimate(pictures: Sequence[bytes], rung: tuple[int, int] | None) -> float:
    """Bytes of all, by a sample: encoding hundreds of large pictures takes a minute a rung."""
    sample = pictures[:: 1 if rung is None else max(1, len(pictures) // _SAMPLE)]
    return sum(len(_encode(picture, rung)[1]) for picture in sample) * len(pictures) / max(1, len(sample))


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
