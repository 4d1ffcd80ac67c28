"""Strategies against sums done by hand and an independent reference in float64, on teachers that are formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from teefusion.errors import SettingsError, TeacherError, TrainingError
from teefusion.settings import LegSettings, StrategySettings, load_settings
from teefusion.strategies import Grid, Weights, effective_velocity, euler_cfg, guide, make_strategy, scheduled_grid

Field = Callable[[Tensor, float], Tensor]


class FormulaTeacher:
    """A teacher whose branches are given functions of state and timestep; counts forwards and batched calls."""

    def __init__(self, conditional: Field, unconditional: Field, others: dict[Weights, FormulaTeacher] | None = None):
        self._conditional, self._unconditional = conditional, unconditional
        self._others = others or {}
        self.forwards = self.calls = 0

    def conditional(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.forwards, self.calls = self.forwards + 1, self.calls + 1
        return self._conditional(x, float(timestep))

    def unconditional(self, x: Tensor, timestep: Tensor) -> Tensor:
        self.forwards, self.calls = self.forwards + 1, self.calls + 1
        return self._unconditional(x, float(timestep))

    def both(self, x: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        self.forwards, self.calls = self.forwards + 2, self.calls + 1
        return self._conditional(x, float(timestep)), self._unconditional(x, float(timestep))

    def on(self, weights: Weights) -> FormulaTeacher:
        return self._others.get(weights, self)


def linear_teacher() -> FormulaTeacher:
    """v_c = 2x + t/1000, v_u = x."""
    return FormulaTeacher(lambda x, t: 2 * x + t / 1000, lambda x, t: x)


def curved_conditional(x: Tensor, t: float) -> Tensor:
    return torch.sin(x + t / 500) + 0.3 * x


def curved_unconditional(x: Tensor, t: float) -> Tensor:
    return 0.5 * torch.cos(x * t / 1000) - 0.2 * x


def curved_teacher() -> FormulaTeacher:
    """Curved in state and time, so that no error cancels."""
    return FormulaTeacher(curved_conditional, curved_unconditional)


def settings(**values: Any) -> StrategySettings:
    return StrategySettings(**({"num_steps": 6} | values))


def stock_grid(num_steps: int) -> Grid:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return scheduled_grid(scheduler, "cpu")


def grid_of(num_steps: int = 6) -> Grid:
    grid = stock_grid(num_steps)
    return Grid(grid.sigmas.double(), grid.timesteps.double())


def noise() -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


SCALES = torch.tensor([1.0, 2.5, 7.0], dtype=torch.float64)


@pytest.fixture
def grid() -> Grid:
    return stock_grid(4)


def test_guide_is_diffusers_convention_with_one_scale_a_picture() -> None:
    conditional, unconditional = torch.full((2, 1, 1, 1), 5.0), torch.full((2, 1, 1, 1), 3.0)
    assert guide(conditional, unconditional, torch.tensor([1.0, 4.0])).flatten().tolist() == [5.0, 11.0]


def test_grid_starts_at_noise_ends_at_zero_and_keeps_the_double_shift(grid: Grid) -> None:
    assert float(grid.sigmas[0]) == 1.0
    assert float(grid.sigmas[-1]) == 0.0
    assert float(grid.timesteps[-1]) == pytest.approx(8.93, abs=0.01)
    assert len(grid) == 4


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.5, 0.0], [1.0, 0.4, 0.6, 0.0]])
def test_a_schedule_that_stands_or_rises_is_refused(sigmas: list[float]) -> None:
    with pytest.raises(TeacherError, match=r"cannot be sampled or inverted.*in step 1"):
        Grid(torch.tensor(sigmas), torch.tensor(sigmas[:-1]) * 1000)


def test_euler_step_is_worked_out_by_hand() -> None:
    grid = Grid(torch.tensor([1.0, 0.75, 0.0]), torch.tensor([1000.0, 750.0]))
    x = torch.full((1, 1, 1, 1), 2.0)
    step = euler_cfg(linear_teacher(), grid, x, 0, torch.tensor([3.0]))
    # v_c = 5, v_u = 2, v = 2 + 3 * 3 = 11, x' = 2 - 0.25 * 11
    assert float(step.x_next_BCHW) == -0.75
    assert float(step.conditional_BCHW) == 5.0


def test_effective_velocity_of_an_euler_step_is_the_guided_velocity(grid: Grid) -> None:
    x = noise().float()
    for i in range(len(grid)):
        teacher = linear_teacher()
        step = euler_cfg(teacher, grid, x, i, SCALES.float())
        expected = guide(*teacher.both(x, grid.timesteps[i]), SCALES.float())
        torch.testing.assert_close(effective_velocity(grid, x, step.x_next_BCHW, i), expected, rtol=1e-4, atol=1e-4)


def test_z_sampling_step_is_worked_out_by_hand() -> None:
    grid = Grid(torch.tensor([1.0, 0.75, 0.0]), torch.tensor([1000.0, 750.0]))
    strategy = make_strategy(settings(name="z_sampling", num_steps=2))
    step = strategy.step(linear_teacher(), grid, torch.full((1, 1, 1, 1), 2.0), 0, torch.tensor([3.0]))
    # strong: v = 2 + 3 (5 - 2) = 11, y = 2 - 0.25 * 11 = -0.75
    # weak, unconditional at t = 750: v = -0.75, x~ = -0.75 - 0.25 * 0.75 = -0.9375
    # strong again: v_c = -0.875, v = -0.9375 + 3 * 0.0625 = -0.75, x' = -0.9375 + 0.25 * 0.75
    assert float(step.x_next_BCHW) == -0.75
    assert float(step.conditional_BCHW) == 5.0


def reference(values: StrategySettings, x: Tensor, grid: Grid, i: int, s: float) -> Tensor:
    """One reflected step of one picture, straight from the formulas (Z-Sampling 2.2, 2.3 and W2SD 3.3 as ported)."""
    weak = {"z_sampling": 0.0, "w2sd": 1.0}[values.name] if values.weak.guidance is None else values.weak.guidance
    strong = s if values.strong.guidance is None else values.strong.guidance
    normal = strong if values.normal is None else s if values.normal.guidance is None else values.normal.guidance

    def v(at: Tensor, t: float, scale: float) -> Tensor:
        return (1 - scale) * curved_unconditional(at, t) + scale * curved_conditional(at, t)

    h = float(grid.sigmas[i + 1]) - float(grid.sigmas[i])
    t, t_next = float(grid.timesteps[i]), float(grid.timesteps[i + 1])
    y = x + h * v(x, t, strong)
    if values.inverse == "aligned":
        back = y - h * v(y, t_next, weak)
    elif values.inverse == "official":
        back = y - h * v(y, t, weak)
    else:  # by Newton's method on every element, since these formulas act element by element
        back = y.clone()
        for _ in range(60):
            point = back.clone().requires_grad_(True)
            value = point + h * v(point, t, weak) - y
            (slope,) = torch.autograd.grad(value.sum(), point)
            back = back - (value / slope).detach()
    return back + h * v(back, t, normal)


@pytest.mark.parametrize("inverse", ["aligned", "official", "picard"])
@pytest.mark.parametrize(
    "values",
    [
        {"name": "z_sampling"},
        {"name": "z_sampling", "strong": {"guidance": 5.5}, "weak": {"guidance": 0.5}},
        {"name": "w2sd"},
        {"name": "w2sd", "strong": {"guidance": 6.0}, "weak": {"guidance": 1.5}, "normal": {"guidance": 2.0}},
    ],
)
def test_reflection_agrees_with_the_formulas_in_float64(values: dict[str, Any], inverse: str) -> None:
    # Enough steps for the exact inverse to be unique, so that both ways of finding it find the same.
    chosen = settings(**values, inverse=inverse, picard_iterations=80, num_steps=16)
    strategy, grid, x = make_strategy(chosen), grid_of(16), noise()
    for i in range(len(grid) - 1):
        got = strategy.step(curved_teacher(), grid, x, i, SCALES).x_next_BCHW
        expected = torch.stack([reference(chosen, x[b], grid, i, float(SCALES[b])) for b in range(3)])
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)


def test_with_one_direction_of_guidance_everywhere_it_is_twice_strong_less_weak() -> None:
    direction = torch.linspace(-1, 1, 32, dtype=torch.float64).view(2, 4, 4)
    teacher = FormulaTeacher(lambda x, t: direction + 0.25, lambda x, t: torch.zeros_like(x) + 0.25)
    strategy, grid, x = make_strategy(settings(name="z_sampling", weak={"guidance": 0.5})), grid_of(), noise()
    for i in range(len(grid) - 1):
        step = strategy.step(teacher, grid, x, i, SCALES)
        v_eff = (step.x_next_BCHW - x) / grid.width(i)
        expected = guide(*teacher.both(x, grid.timesteps[i]), 2 * SCALES - 0.5)
        torch.testing.assert_close(v_eff, expected, rtol=1e-12, atol=1e-12)


def test_weights_gap_is_normal_plus_strong_less_weak() -> None:
    def constant(value: float) -> FormulaTeacher:
        return FormulaTeacher(lambda x, t: torch.full_like(x, value), lambda x, t: torch.zeros_like(x))

    others = {Weights(lora_scale=1.5): constant(3.0), Weights("second"): constant(0.5)}
    teacher = FormulaTeacher(lambda x, t: torch.ones_like(x), lambda x, t: torch.zeros_like(x), others)
    chosen = settings(
        name="w2sd",
        strong={"lora_scale": 1.5},
        weak={"transformer": "second"},
        normal={"guidance": 2.0},
        second={"uri": "a/b"},
        lora={"uri": "a/c"},
    )
    grid, x = grid_of(), noise()
    step = make_strategy(chosen).step(teacher, grid, x, 0, SCALES)
    expected = (2.0 + SCALES * 3.0 - 0.5).view(-1, 1, 1, 1).expand_as(x)
    torch.testing.assert_close((step.x_next_BCHW - x) / grid.width(0), expected, rtol=1e-12, atol=1e-12)


def test_equal_strong_and_weak_with_the_exact_inverse_is_the_euler_step() -> None:
    values = {"strong": {"guidance": 4.0}, "weak": {"guidance": 4.0}, "inverse": "picard"}
    strategy, grid, x = make_strategy(settings(name="z_sampling", **values)), grid_of(), noise()
    four = torch.full_like(SCALES, 4.0)
    for i in range(len(grid)):
        got = strategy.step(curved_teacher(), grid, x, i, four).x_next_BCHW
        torch.testing.assert_close(got, euler_cfg(curved_teacher(), grid, x, i, four).x_next_BCHW, rtol=0, atol=1e-14)


def test_the_aligned_inverse_misses_the_euler_step_by_the_square_of_its_width() -> None:
    values = {"strong": {"guidance": 4.0}, "weak": {"guidance": 4.0}}
    misses = []
    for num_steps in (40, 80):
        strategy, grid = make_strategy(settings(name="z_sampling", num_steps=num_steps, **values)), grid_of(num_steps)
        i, four = num_steps // 2, torch.full_like(SCALES, 4.0)
        got = strategy.step(curved_teacher(), grid, noise(), i, four).x_next_BCHW
        euler = euler_cfg(curved_teacher(), grid, noise(), i, four).x_next_BCHW
        misses.append(float((got - euler).norm() / grid.width(i) ** 2))
    assert misses[0] == pytest.approx(misses[1], rel=0.2)
    assert misses[0] > 0.1  # a miss there is


def test_an_inverse_that_does_not_converge_is_an_error_that_names_the_step() -> None:
    steep = FormulaTeacher(lambda x, t: x, lambda x, t: 20 * x)
    strategy = make_strategy(settings(name="z_sampling", inverse="picard"))
    with pytest.raises(TrainingError, match=r"Step 2 cannot be inverted.*8 fixed-point iterations.*aligned"):
        strategy.step(steep, grid_of(), noise(), 2, SCALES)


@pytest.mark.parametrize(
    ("values", "forwards", "calls"),
    [
        ({"name": "euler_cfg"}, lambda n: 2 * n, lambda n: n),
        ({"name": "z_sampling", "weak": {"guidance": 0.5}}, lambda n: 6 * n - 4, lambda n: 3 * n - 2),
        ({"name": "z_sampling"}, lambda n: 5 * n - 3, lambda n: 3 * n - 2),
        ({"name": "w2sd"}, lambda n: 5 * n - 3, lambda n: 3 * n - 2),
        ({"name": "w2sd", "weak": {"guidance": 2.0}}, lambda n: 6 * n - 4, lambda n: 3 * n - 2),
        ({"name": "w2sd", "strong": {"guidance": 1.0}}, lambda n: 1 + 3 * (n - 1), lambda n: 3 * n - 2),
        ({"name": "z_sampling", "reflected_steps": 0}, lambda n: 2 * n, lambda n: n),
        ({"name": "z_sampling", "reflected_steps": 2}, lambda n: 2 * n + 6, lambda n: n + 4),
        (
            {"name": "z_sampling", "inverse": "picard", "picard_iterations": 50},
            lambda n: 2 * n + 52 * (n - 1),
            lambda n: n + 51 * (n - 1),
        ),
    ],
)
def test_the_price_it_states_is_the_price_it_takes(
    values: dict[str, Any], forwards: Callable[[int], int], calls: Callable[[int], int]
) -> None:
    strategy, grid, teacher = make_strategy(settings(**values)), grid_of(), curved_teacher()
    x = noise()
    for i in range(len(grid)):
        x = strategy.step(teacher, grid, x, i, SCALES).x_next_BCHW
    assert teacher.forwards == strategy.forwards(6) == forwards(6)
    assert teacher.calls == calls(6)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"strategy.name": "w2sd", "strategy.reflected_steps": 20}, r"reflected_steps \(20\) is above num_steps - 1"),
        ({"strategy.name": "w2sd", "strategy.reflected_steps": -1}, r"strategy.reflected_steps"),
        ({"strategy.name": "w2sd", "strategy.weak.guidance": -1}, r"strategy.weak.guidance"),
        ({"strategy.name": "w2sd", "strategy.weak.guidance": "nan"}, r"strategy.weak.guidance"),
        ({"strategy.name": "w2sd", "strategy.strong.guidance": 0}, r"strong.guidance is 0"),
        ({"strategy.name": "w2sd", "strategy.normal.guidance": 0}, r"normal.guidance is 0"),
        ({"strategy.name": "w2sd", "strategy.weak.transformer": "second"}, r"second.uri is not set"),
        ({"strategy.name": "w2sd", "strategy.weak.lora_scale": -1.5}, r"lora.uri is not set"),
        ({"strategy.name": "z_sampling", "strategy.normal.guidance": 2}, r"no normal leg"),
        ({"strategy.name": "z_sampling", "strategy.inverse": "exact"}, r"strategy.inverse"),
        ({"strategy.name": "z_sampling", "strategy.picard_iterations": 0}, r"strategy.picard_iterations"),
        ({"strategy.weak.guidance": 0.5}, r"mean nothing to euler_cfg"),
        ({"strategy.name": "heun"}, r"strategy.name"),
        (
            {"strategy.name": "z_sampling", "strategy.weak.lora_scale": 1, "strategy.lora.uri": "a/b"},
            r"differ in guidance alone",
        ),
        (
            {
                "strategy.name": "w2sd",
                "strategy.weak.lora_scale": 1,
                "strategy.weak.transformer": "second",
                "strategy.lora.uri": "a/b",
                "strategy.second.uri": "a/b",
            },
            r"the LoRA is the teacher's",
        ),
    ],
)
def test_parameters_that_cannot_be_meant_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load_settings(overrides=values)


def test_a_leg_is_set_by_a_variable_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEFUSION_STRATEGY__NAME", "w2sd")
    monkeypatch.setenv("TEEFUSION_STRATEGY__WEAK__GUIDANCE", "1.5")
    assert load_settings().strategy.weak == LegSettings(guidance=1.5)
