"""Loss and residual, worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from teefusion.distillation import ResidualMeter, distillation_loss


def pictures(*values: float) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)


def test_plain_loss_is_the_mean_squared_error() -> None:
    loss = distillation_loss(
        pictures(1.0, 3.0), pictures(0.0, 0.0), torch.tensor([9.0, 9.0]), weighting="none", scale=1.0
    )
    assert float(loss) == 5.0


def test_guidance_weighting_divides_by_the_gap() -> None:
    # gaps 0 and 3 at scale 1: weights 1 and 1/4, errors 1 and 4
    loss = distillation_loss(
        pictures(1.0, 2.0), pictures(0.0, 0.0), torch.tensor([0.0, 3.0]), weighting="guidance", scale=1.0
    )
    assert float(loss) == pytest.approx(1.0)


def test_residual_is_a_ratio_of_sums_overall_and_by_bucket() -> None:
    meter = ResidualMeter(1.0, 7.0)
    target, gap, s = pictures(0.0, 0.0, 0.0), torch.tensor([4.0, 4.0, 8.0]), torch.tensor([1.5, 6.9, 7.0])
    meter.add(pictures(1.0, 2.0, 0.0), target, gap, s, torch.tensor([0.01, 0.2, 1.0]))
    assert meter.overall == pytest.approx(5 / 16)
    assert [bucket["residual"] for bucket in meter.by_sigma()] == pytest.approx([1 / 4, 4 / 4, 0])
    first, last = meter.by_guidance()
    assert (first["low"], first["high"], first["residual"]) == (1.0, 2.0, pytest.approx(0.25))
    assert (last["low"], last["residual"]) == (6.0, pytest.approx(4 / 12))
    rows = [(row["low"], cell) for row in meter.by_sigma_and_guidance() for cell in row["by_guidance"]]
    assert [sigma for sigma, _ in rows] == pytest.approx([0, 1 / 6, 5 / 6])
    assert [cell["low"] for _, cell in rows] == [1, 6, 6]
    assert [cell["residual"] for _, cell in rows] == pytest.approx([1 / 4, 4 / 4, 0])


def test_a_student_that_copies_the_conditional_velocity_has_residual_one() -> None:
    torch.manual_seed(0)
    conditional, unconditional, s = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8), torch.linspace(2, 7, 8)
    target = unconditional + s.view(-1, 1, 1, 1) * (conditional - unconditional)
    gap = (target - conditional).square().mean(dim=(1, 2, 3))
    meter = ResidualMeter(1.0, 7.0)
    meter.add(conditional, target, gap, s, torch.linspace(0, 1, 8))
    assert meter.overall == pytest.approx(1.0, rel=1e-6)


def test_nothing_measured_is_nan() -> None:
    assert math.isnan(ResidualMeter(1.0, 7.0).overall)
