"""Diversity, saturation and guidance control: worked out by hand on pictures and directions of known difference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from PIL import Image
from torch import Tensor

from teefusion.memory import peak_bytes, reset_peak
from teefusion.prompts import Prompt
from teefusion.samplers import Sampler
from teefusion.settings import StrategySettings
from teefusion.strategies import effective_guidance
from teefusion.sweeps import diversity, guidance_sweep, pairwise_distances, saturation

PROMPTS = [Prompt("a"), Prompt("b")]


class ColorScorer:
    """Scores a picture by its red, and embeds it as its colour's direction."""

    name = "color"

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        return [float(image.getpixel((0, 0))[0]) for image in images]  # type: ignore[index]

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        colors = torch.tensor([image.getpixel((0, 0)) for image in images], dtype=torch.float32)
        return colors / colors.norm(dim=-1, keepdim=True)


def by_scale(prompts: list[str], s: float, generators: list[torch.Generator]) -> list[Image.Image]:
    """As red as s says, whatever the noise."""
    return [Image.new("RGB", (2, 2), (int(10 * s), 10, 10)) for _ in prompts]


def by_noise(prompts: list[str], s: float, generators: list[torch.Generator]) -> list[Image.Image]:
    """Red, green or blue, as the noise says."""
    colors = ((255, 0, 0), (0, 255, 0), (0, 0, 255))
    return [Image.new("RGB", (2, 2), colors[int(torch.randint(3, (1,), generator=g))]) for g in generators]


def test_distances_are_one_minus_the_cosine_over_pairs() -> None:
    east, north = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    # First prompt: two alike and one across, so pairs 0, 1, 1. Second: all alike. Third: opposite ways.
    directions_SBD = torch.stack(
        [torch.stack([east, east, east]), torch.stack([east, east, -east]), torch.stack([north, east, east])]
    )
    torch.testing.assert_close(pairwise_distances(directions_SBD), torch.tensor([2 / 3, 0.0, 4 / 3]))


def test_a_row_whose_pictures_do_not_follow_the_noise_has_no_diversity() -> None:
    rows = {"same": Sampler(by_scale, [], 4.0, 0), "other": Sampler(by_noise, [], 4.0, 0)}
    found = diversity(rows, ColorScorer(), PROMPTS * 4, seeds=4, batch_size=3)  # type: ignore[arg-type]
    assert found["same"].mean == pytest.approx(0, abs=1e-6)
    assert 0.3 < found["other"].mean <= 1
    assert found["other"].n == 8


def test_the_sweep_follows_the_scale_and_leaves_the_row_as_it_was() -> None:
    row = Sampler(by_scale, [], 4.0, 0)
    swept = guidance_sweep({"student": row}, ColorScorer(), PROMPTS, (1.0, 2.0), batch_size=1)  # type: ignore[arg-type]
    points = swept["student"]
    assert [point.score.mean for point in points] == [10.0, 20.0]
    assert points[0].saturation.mean == 0  # grey
    assert points[1].saturation.mean == pytest.approx(0.5, abs=0.01)  # 10 of 20
    assert (row.pictures, row.seconds) == (0, [])
    assert "images" not in points[0].to_dict()


@pytest.mark.parametrize(("color", "expected"), [("white", 0.0), ("red", 1.0), ((200, 100, 100), 0.5)])
def test_saturation_is_hsvs(color: object, expected: float) -> None:
    assert saturation(Image.new("RGB", (2, 2), color)) == pytest.approx(expected, abs=0.01)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ({"name": "euler_cfg"}, 4.0),
        ({"name": "z_sampling"}, 8.0),  # 4 + 4 - 0
        ({"name": "w2sd"}, 7.0),  # 4 + 4 - 1
        ({"name": "w2sd", "strong": {"guidance": 5.5}, "weak": {"guidance": 2.0}, "normal": {}}, 7.5),
    ],
)
def test_effective_guidance_is_normal_plus_strong_minus_weak(strategy: dict[str, object], expected: float) -> None:
    assert effective_guidance(StrategySettings.model_validate(strategy), 4.0) == expected


def test_the_peak_is_of_the_work_since_it_was_reset() -> None:
    reset_peak("cpu")
    before = peak_bytes("cpu")
    held = torch.ones(64 << 20, dtype=torch.uint8)
    assert peak_bytes("cpu") - before > 48 << 20
    del held
    reset_peak("cpu")
    assert peak_bytes("cpu") - before < 48 << 20
