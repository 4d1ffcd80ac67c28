"""Small helpers for PIL pictures: bytes, and sheets that put pictures side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence

from PIL import Image


def png_bytes(picture: Image.Image, *, optimize: bool = True) -> bytes:
    """The picture as PNG; ``optimize`` makes it as small as it can be, which takes a large one seconds."""
    stream = io.BytesIO()
    picture.save(stream, "PNG", optimize=optimize)
    return stream.getvalue()


def contact_sheet(rows: Sequence[Sequence[Image.Image]], *, gap: int = 4, scale: int = 1) -> Image.Image:
    """Rows of equally large pictures on a white sheet, ``gap`` pixels apart, enlarged ``scale`` times."""
    width, height = (side * scale for side in rows[0][0].size)
    columns = max(len(row) for row in rows)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, len(rows) * (height + gap) - gap), "white")
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (x * (width + gap), y * (height + gap)))
    return sheet
