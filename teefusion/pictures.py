"""Small helpers for PIL pictures: files, bytes, and sheets that put pictures side by side."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from teefusion.errors import ScorerError
from teefusion.preprocessing import as_rgb
from teefusion.scorer_names import Transparency

LARGEST_PIXELS = 100_000_000
"""Of a picture to score: 10,000 by 10,000. A larger one takes gigabytes to decode, whoever sent it."""


def read_picture(path: Path, *, transparency: Transparency = "white") -> Image.Image:
    """A picture file in RGB. Raises ScorerError for one that is damaged, animated, too large or too deep."""
    try:
        if path.stat().st_size == 0:
            raise ScorerError(f"{path} is empty (0 bytes). Make it again.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have a limit of our own
            with Image.open(path) as image:
                _check_frame(path, image)
                image.load()
                return as_rgb(image, transparency=transparency)
    except Image.DecompressionBombError as error:
        raise ScorerError(_too_large(path, f"{int(str(error).split(' (')[-1].split(' ')[0]):,}")) from error
    except (UnidentifiedImageError, OSError, SyntaxError) as error:  # PIL raises SyntaxError for a broken PNG
        raise ScorerError(f"{path} cannot be read as a picture: {error}. Make it again.") from error
    except ScorerError as error:
        raise error if str(path) in str(error) else ScorerError(f"{path}: {error}") from error


def _check_frame(path: Path, image: Image.Image) -> None:
    if (frames := getattr(image, "n_frames", 1)) > 1:
        raise ScorerError(f"{path} is animated: it has {frames} frames, and one is scored. Save the one that is meant.")
    if image.width * image.height > LARGEST_PIXELS:
        raise ScorerError(_too_large(path, f"{image.width}x{image.height}"))


def _too_large(path: Path, found: str) -> str:
    return f"{path} has {found} pixels, at most {LARGEST_PIXELS:,} are read. Make it smaller: scorers read 224 a side."


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
