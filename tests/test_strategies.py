"""Strategies against sums done by hand, on a teacher that is a formula."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from teefusion.settings import StrategySettings
from teefusion.strategies import Grid, effective_velocity, euler_cfg, guide, make_grid, make_strategy


class LinearTeacher:
    """v_c = 2x + t/1000, v_u = x; counts forwards."""

    def __init__(self) -> None:
        self.forwards = 0

    def both(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        self.forwards += 2
        return 2 * x + timestep / 1000, x


@pytest.fixture
def grid() -> Grid:
    return make_grid(FlowMatchEulerDiscreteScheduler(shift=3.0), 4, "cpu")


def test_guide_is_diffusers_convention_with_one_scale_a_picture() -> None:
    conditional, unconditional = torch.full((2, 1, 1, 1), 5.0), torch.full((2, 1, 1, 1), 3.0)
    assert guide(conditional, unconditional, torch.tensor([1.0, 4.0])).flatten().tolist() == [5.0, 11.0]


def test_grid_starts_at_noise_ends_at_zero_and_keeps_the_double_shift(grid: Grid) -> None:
    assert float(grid.sigmas[0]) == 1.0
    assert float(grid.sigmas[-1]) == 0.0
    assert float(grid.timesteps[-1]) == pytest.approx(8.93, abs=0.01)
    assert len(grid) == 4


def test_euler_step_is_worked_out_by_hand() -> None:
    grid = Grid(torch.tensor([1.0, 0.75, 0.0]), torch.tensor([1000.0, 750.0]))
    x = torch.full((1, 1, 1, 1), 2.0)
    step = euler_cfg(LinearTeacher(), grid, x, 0, torch.tensor([3.0]))
    # v_c = 5, v_u = 2, v = 2 + 3 * 3 = 11, x' = 2 - 0.25 * 11
    assert float(step.x_next_BCHW) == -0.75
    assert float(step.conditional_BCHW) == 5.0


def test_effective_velocity_of_an_euler_step_is_the_guided_velocity(grid: Grid) -> None:
    torch.manual_seed(0)
    x, s = torch.randn(3, 2, 4, 4), torch.tensor([1.0, 2.0, 7.0])
    for i in range(len(grid)):
        teacher = LinearTeacher()
        step = euler_cfg(teacher, grid, x, i, s)
        expected = guide(*teacher.both(x, grid.timesteps[i]), s)
        torch.testing.assert_close(effective_velocity(grid, x, step.x_next_BCHW, i), expected, rtol=1e-4, atol=1e-4)


def test_the_price_it_states_is_the_price_it_takes(grid: Grid) -> None:
    strategy, teacher = make_strategy(StrategySettings()), LinearTeacher()
    x = torch.zeros(1, 1, 2, 2)
    for i in range(len(grid)):
        x = strategy.step(teacher, grid, x, i, torch.tensor([4.0])).x_next_BCHW
    assert teacher.forwards == strategy.forwards(len(grid)) == 8
