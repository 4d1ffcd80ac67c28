"""From a picture to what a CLIP image tower reads, without torchvision.

Axes: C, H, W = colours, height and width of a picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from teefusion.errors import ScorerError
from teefusion.scorer_names import Transparency

# OpenAI CLIP's, which HPS v2 and PickScore use too: open_clip/constants.py
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# 8 bits a channel; PIL would clip the deeper ones ("I;16", "F") to white without a word.
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"})


@dataclass(frozen=True)
class Preprocessing:
    """How a scorer's pictures are prepared. Part of what its scores mean, so it goes into every result."""

    size: int
    """Pixels a side of what the model reads."""
    fit: Literal["pad", "crop"] = "pad"
    """`pad`, HPS v2's: the longest side becomes ``size``, zeros around. `crop`, OpenAI CLIP's: the shortest does, and
    the centre is kept."""
    antialias: bool = True
    """Of `pad`, whose resize is done on the tensor; that of `crop` is PIL's, which always does."""
    transparency: Transparency = "white"
    """Composited over white, or refused."""
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD

    def __call__(self, image: Image.Image) -> Tensor:
        """CHW, float32, normalised. Raises ScorerError for a picture that has no 8-bit RGB, or is transparent."""
        picture = as_rgb(image, transparency=self.transparency)
        if self.fit == "crop":
            pixels_CHW = to_tensor(resize_and_crop(picture, self.size))
        else:
            pixels_CHW = resize_and_pad(to_tensor(picture), self.size, antialias=self.antialias)
        mean_C, std_C = torch.tensor(self.mean), torch.tensor(self.std)
        return (pixels_CHW - mean_C[:, None, None]) / std_C[:, None, None]

    def describe(self) -> dict[str, Any]:
        """JSON-ready."""
        if self.fit == "crop":
            fitted = {"resize": f"shortest side to {self.size}, bicubic", "antialias": True, "crop": "centre"}
        else:
            fitted = {"resize": f"longest side to {self.size}, bicubic", "antialias": self.antialias}
            fitted |= {"padding": "zeros, centred"}
        transparency = "composited over white" if self.transparency == "white" else "refused"
        return {"transparency": transparency} | fitted | {"mean": list(self.mean), "std": list(self.std)}


def as_rgb(image: Image.Image, *, transparency: Transparency = "white") -> Image.Image:
    """The picture in RGB. What is transparent shows white, as on a page; or is refused. Raises ScorerError."""
    if image.mode not in _MODES or not all(image.size):
        raise ScorerError(
            f"A picture of mode {image.mode!r} and {image.width}x{image.height} pixels cannot be scored: pictures have "
            "8 bits a channel and at least one pixel. Convert it to RGB first."
        )
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    if transparency == "refuse" and image.getchannel("A").getextrema() != (255, 255):
        raise ScorerError(
            f"A picture of {image.width}x{image.height} pixels is partly transparent, and evaluate.transparency is "
            "'refuse'. Flatten it first, or set evaluate.transparency to 'white'."
        )
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_tensor(picture: Image.Image) -> Tensor:
    """CHW of an RGB picture, float32 in [0, 1]."""
    pixels_HWC = np.asarray(picture, dtype=np.float32) / 255
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def resize_and_pad(pixels_CHW: Tensor, size: int, *, antialias: bool) -> Tensor:
    """Longest side to ``size`` (bicubic, not clamped), then zeros around it to a centred square.

    Done before normalisation, so that the border is black, as published with HPS v2. Whether torchvision antialiased
    depends on its version (none up to 0.16, yes from 0.17), which moves HPS v2.1 by about two points.
    """
    height, width = pixels_CHW.shape[-2:]
    scale = size / max(height, width)
    new_height, new_width = (max(1, round(side * scale)) for side in (height, width))
    if scale != 1:
        pixels_CHW = F.interpolate(
            pixels_CHW[None], size=(new_height, new_width), mode="bicubic", align_corners=False, antialias=antialias
        )[0]
    top, left = (size - new_height) // 2, (size - new_width) // 2
    return F.pad(pixels_CHW, (left, size - new_width - left, top, size - new_height - top))


def resize_and_crop(picture: Image.Image, size: int) -> Image.Image:
    """Shortest side to ``size`` (PIL's bicubic on 8 bits, the other side rounded down), then the centred square.

    That is what OpenAI CLIP was published with, and transformers' CLIPImageProcessor does.
    """
    shortest = min(picture.size)
    width, height = (int(size * side / shortest) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
