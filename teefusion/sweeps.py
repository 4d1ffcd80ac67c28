"""What a score at one guidance scale does not tell: how a row follows the scale, and how much its pictures differ.

Guidance buys score with saturation and with diversity, so a student is held against its teacher in all three.

Axes: S = seeds, B = prompts, D = width of the scorer's image space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from teefusion.group_means import Mean
from teefusion.prompts import Prompt
from teefusion.samplers import Sampler
from teefusion.scoring import Scorer


@dataclass(frozen=True)
class SweepPoint:
    """A row at one guidance scale."""

    scale: float
    score: Mean
    saturation: Mean
    """Mean HSV saturation of a picture, in [0, 1]."""
    images: Sequence[Image.Image] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the pictures."""
        return {"scale": self.scale, "score": asdict(self.score), "saturation": asdict(self.saturation)}


def guidance_sweep(
    rows: Mapping[str, Sampler], scorer: Scorer, prompts: Sequence[Prompt], scales: Sequence[float], *, batch_size: int
) -> dict[str, list[SweepPoint]]:
    """Each row at each scale, one picture a prompt, from the comparison's noise. Nothing of it is timed."""
    texts = [prompt.text for prompt in prompts]

    def point(row: Sampler, scale: float) -> SweepPoint:
        images = _draw(row.at(guidance_scale=scale), prompts, batch_size)
        scores = scorer.score(images, texts)
        return SweepPoint(scale, Mean.of(scores), Mean.of([saturation(image) for image in images]), images)

    return {name: [point(row, scale) for scale in scales] for name, row in rows.items()}


def diversity(
    rows: Mapping[str, Sampler], scorer: Scorer, prompts: Sequence[Prompt], *, seeds: int, batch_size: int
) -> dict[str, Mean]:
    """For each row the mean distance between a prompt's pictures of ``seeds`` seeds, over prompts; 2 seeds at least.

    A distance is 1 - cosine in the scorer's image space. The first seed is the comparison's.
    """

    def embedded(row: Sampler) -> Tensor:
        drawn = (_draw(row.at(seed=row.seed + k), prompts, batch_size) for k in range(seeds))
        return torch.stack([scorer.embed(images) for images in drawn])

    return {name: Mean.of(pairwise_distances(embedded(row)).tolist()) for name, row in rows.items()}


def pairwise_distances(directions_SBD: Tensor) -> Tensor:
    """Mean of 1 - cosine over the pairs of S directions of length 1, [B]."""
    count = len(directions_SBD)
    of_all_B = directions_SBD.sum(dim=0).square().sum(dim=-1)  # of every pair twice, and of each with itself: 1
    return 1 - (of_all_B - count) / (count * (count - 1))


def _draw(row: Sampler, prompts: Sequence[Prompt], batch_size: int) -> list[Image.Image]:
    starts = range(0, len(prompts), batch_size)
    return [image for start in starts for image in row(prompts[start : start + batch_size])]


def saturation(image: Image.Image) -> float:
    """Mean HSV saturation, in [0, 1]."""
    return float(np.asarray(image.convert("HSV"))[..., 1].mean()) / 255
