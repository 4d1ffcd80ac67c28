"""One guided teacher step. Every strategy is a pure function over one sigma grid, and states its forwards.

    step(model, grid, x, i, s) -> Step         x: state at sigma_i, s: guidance scale a picture

The target of every strategy is the same: the effective velocity ``(x_next - x) / (sigma_next - sigma)``, in float32,
so that a student never knows which strategy taught it, and a new strategy is one new function.

Reflection takes a strong step, inverts it with a weak velocity, and steps again. Z-Sampling (arXiv 2412.10891) is the
case in which strong and weak differ in guidance alone, W2SD (arXiv 2502.00473) the one in which they may differ in
weights too. With ``h = sigma_{i+1} - sigma_i``, to first order in h,

    v_eff = v_strong(x) + v_normal(x~) - v_weak(y)  ~  v_normal + v_strong - v_weak

Axes: B = pictures, C, H, W = latent channels and size. Guidance is diffusers' s: ``v = v_u + s * (v_c - v_u)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from teefusion.errors import TeacherError, TrainingError
from teefusion.settings import Inverse, LegSettings, StrategySettings


class Weights(NamedTuple):
    """Which weights a forward runs on."""

    transformer: Literal["teacher", "second"] = "teacher"
    lora_scale: float = 0.0


TEACHER = Weights()
"""The teacher's own."""


class Denoiser(Protocol):
    """A teacher with its prompts bound: velocities [B, C, H, W] at states of one batch. Timesteps are 1000 sigma."""

    def conditional(self, x_BCHW: Tensor, timestep: Tensor) -> Tensor:
        """One forward a picture."""
        ...

    def unconditional(self, x_BCHW: Tensor, timestep: Tensor) -> Tensor:
        """One forward a picture."""
        ...

    def both(self, x_BCHW: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional velocity, from one batched call that counts as two forwards a picture."""
        ...

    def on(self, weights: Weights) -> Denoiser:
        """The same prompts on other weights."""
        ...


@dataclass(frozen=True)
class Grid:
    """A sampling schedule: sigmas [N + 1] from noise to 0, and the network's timesteps [N] (1000 sigma).

    Raises TeacherError where the sigmas do not fall from each to the next: such a step has no velocity and no inverse.
    """

    sigmas: Tensor
    timesteps: Tensor

    def __post_init__(self) -> None:
        flat = (self.sigmas.diff() >= 0).nonzero().flatten().tolist()
        if flat:
            i = flat[0]
            raise TeacherError(
                f"The teacher's schedule cannot be sampled or inverted: sigma goes from {float(self.sigmas[i]):.4g} to "
                f"{float(self.sigmas[i + 1]):.4g} in step {i}, and must fall. Choose fewer steps (strategy.num_steps) "
                "or correct the shift in the teacher's scheduler_config.json."
            )

    def __len__(self) -> int:
        return len(self.timesteps)

    def width(self, i: int) -> Tensor:
        """H = sigma_{i+1} - sigma_i, negative."""
        return self.sigmas[i + 1] - self.sigmas[i]


class Step(NamedTuple):
    """What one teacher step gives: the next state, and the conditional velocity at its start (for the residual)."""

    x_next_BCHW: Tensor
    conditional_BCHW: Tensor


StepFunction = Callable[[Denoiser, Grid, Tensor, int, Tensor], Step]


@dataclass(frozen=True)
class Strategy:
    """A step function with its price."""

    name: str
    step: StepFunction
    forwards_a_step: int
    forwards_a_reflection: int = 0
    reflected_steps: int = 0

    def forwards(self, num_steps: int) -> int:
        """Transformer forwards a picture over a whole trajectory (NFE)."""
        return sum(self.forwards_at(i) for i in range(num_steps))

    def forwards_at(self, i: int) -> int:
        """Transformer forwards a picture of step i."""
        return self.forwards_a_step + (self.forwards_a_reflection if i < self.reflected_steps else 0)


def guide(conditional: Tensor, unconditional: Tensor, s_B: Tensor) -> Tensor:
    """Classifier-free guidance, ``v_u + s (v_c - v_u)``, with one scale a picture (Ho & Salimans, arXiv 2207.12598)."""
    return unconditional + s_B.view(-1, 1, 1, 1) * (conditional - unconditional)


def euler_cfg(model: Denoiser, grid: Grid, x_BCHW: Tensor, i: int, s_B: Tensor) -> Step:
    """One Euler step along the guided velocity. Two forwards."""
    conditional, unconditional = model.both(x_BCHW, grid.timesteps[i])
    return Step(x_BCHW + grid.width(i) * guide(conditional, unconditional, s_B), conditional)


@dataclass(frozen=True)
class Leg:
    """One of reflection's velocities: which weights, how much guidance. No guidance means the trajectory's own s."""

    weights: Weights
    guidance: float | None

    @property
    def forwards(self) -> int:
        """A picture: one branch where the scale leaves only one."""
        return 1 if self.guidance in (0.0, 1.0) else 2

    def velocity(self, model: Denoiser, x_BCHW: Tensor, timestep: Tensor, s_B: Tensor) -> Tensor:
        """The leg's guided velocity."""
        return self._branches(model, x_BCHW, timestep, s_B)[0]

    def step(self, model: Denoiser, grid: Grid, x_BCHW: Tensor, i: int, s_B: Tensor) -> Step:
        """One Euler step. Raises ValueError for a leg with no conditional branch."""
        velocity, conditional = self._branches(model, x_BCHW, grid.timesteps[i], s_B)
        if conditional is None:
            raise ValueError("a leg that steps forward needs the conditional branch: its guidance cannot be 0")
        return Step(x_BCHW + grid.width(i) * velocity, conditional)

    def _branches(self, model: Denoiser, x_BCHW: Tensor, timestep: Tensor, s_B: Tensor) -> tuple[Tensor, Tensor | None]:
        model = model.on(self.weights)
        if self.guidance == 0.0:
            return model.unconditional(x_BCHW, timestep), None
        if self.guidance == 1.0:
            conditional = model.conditional(x_BCHW, timestep)
            return conditional, conditional
        conditional, unconditional = model.both(x_BCHW, timestep)
        scale_B = s_B if self.guidance is None else torch.full_like(s_B, self.guidance)
        return guide(conditional, unconditional, scale_B), conditional


@dataclass(frozen=True)
class Reflection:
    """Strong step, weak inverse step, normal step, on the first ``reflected_steps`` steps; then normal steps alone."""

    strong: Leg
    weak: Leg
    normal: Leg
    reflected_steps: int
    inverse: Inverse
    picard_iterations: int
    picard_tolerance: float

    @property
    def forwards(self) -> int:
        """A reflection's, beside those of the normal step."""
        return self.strong.forwards + self.weak.forwards * (self.picard_iterations if self.inverse == "picard" else 1)

    def step(self, model: Denoiser, grid: Grid, x_BCHW: Tensor, i: int, s_B: Tensor) -> Step:
        """One step; see the module. Raises TrainingError where ``picard`` does not converge."""
        if i >= self.reflected_steps:
            return self.normal.step(model, grid, x_BCHW, i, s_B)
        there_BCHW, conditional = self.strong.step(model, grid, x_BCHW, i, s_B)
        back_BCHW = self._invert(model, grid, x_BCHW, there_BCHW, i, s_B)
        return Step(self.normal.step(model, grid, back_BCHW, i, s_B).x_next_BCHW, conditional)

    def _invert(self, model: Denoiser, grid: Grid, x_BCHW: Tensor, y_BCHW: Tensor, i: int, s_B: Tensor) -> Tensor:
        """The state from which the weak velocity would have led to ``y``."""
        if self.inverse == "aligned":  # the reversed ODE by Euler, at the true next timestep of the shifted schedule
            return y_BCHW - grid.width(i) * self.weak.velocity(model, y_BCHW, grid.timesteps[i + 1], s_B)
        if self.inverse == "official":  # as published: at the new state, but with the old timestep
            return y_BCHW - grid.width(i) * self.weak.velocity(model, y_BCHW, grid.timesteps[i], s_B)
        return self._invert_exactly(model, grid, x_BCHW, y_BCHW, i, s_B)

    def _invert_exactly(
        self, model: Denoiser, grid: Grid, x_BCHW: Tensor, y_BCHW: Tensor, i: int, s_B: Tensor
    ) -> Tensor:
        """Solve ``z + h v_weak(z, t_i) = y`` for z by fixed-point iteration from x, the solution where weak is strong.

        Always as many iterations as set, so that forwards can be counted beforehand. Each shrinks the error by
        ``|h|`` times the velocity's Lipschitz constant.
        """
        z_BCHW = x_BCHW
        for _ in range(self.picard_iterations):
            before_BCHW = z_BCHW
            z_BCHW = y_BCHW - grid.width(i) * self.weak.velocity(model, before_BCHW, grid.timesteps[i], s_B)
        moved = float((z_BCHW - before_BCHW).square().mean().sqrt() / z_BCHW.square().mean().sqrt())
        if not moved <= self.picard_tolerance:  # NaN too
            raise TrainingError(
                f"Step {i} cannot be inverted: after {self.picard_iterations} fixed-point iterations the state still "
                f"moves by {moved:.2g} of its size, strategy.picard_tolerance is {self.picard_tolerance:g}. Raise "
                "strategy.picard_iterations or strategy.num_steps, or choose --set strategy.inverse=aligned."
            )
        return z_BCHW


def effective_velocity(grid: Grid, x_BCHW: Tensor, x_next_BCHW: Tensor, i: int) -> Tensor:
    """The velocity of the Euler step that a strategy's step amounts to, float32."""
    return (x_next_BCHW.float() - x_BCHW.float()) / grid.width(i)


def effective_guidance(settings: StrategySettings, s: float) -> float:
    """The s at which plain CFG guides as much as the strategy at s: to first order a reflection's guidance is
    ``normal + strong - weak``. What other weights add is not in it.
    """
    if settings.name == "euler_cfg":
        return s
    strong, weak, normal = settings.strong, settings.weak_leg, settings.normal or settings.strong
    strong_s, weak_s, normal_s = (s if leg.guidance is None else leg.guidance for leg in (strong, weak, normal))
    return normal_s + strong_s - weak_s


def make_strategy(settings: StrategySettings) -> Strategy:
    """The strategy that the settings name."""
    if settings.name == "euler_cfg":
        return Strategy(settings.name, euler_cfg, forwards_a_step=2)
    reflection = Reflection(
        strong=_leg(settings.strong),
        weak=_leg(settings.weak_leg),
        normal=_leg(settings.normal or settings.strong),
        reflected_steps=settings.reflections,
        inverse=settings.inverse,
        picard_iterations=settings.picard_iterations,
        picard_tolerance=settings.picard_tolerance,
    )
    return Strategy(
        settings.name,
        reflection.step,
        forwards_a_step=reflection.normal.forwards,
        forwards_a_reflection=reflection.forwards,
        reflected_steps=reflection.reflected_steps,
    )


def _leg(settings: LegSettings) -> Leg:
    return Leg(Weights(settings.transformer, settings.lora_scale), settings.guidance)


def scheduled_grid(scheduler: Any, device: str) -> Grid:
    """The grid of a diffusers flow-matching scheduler whose timesteps are set."""
    return Grid(scheduler.sigmas.to(device, torch.float32), scheduler.timesteps.to(device, torch.float32))


def sub_grid(num_steps: int, student_steps: int) -> list[int]:
    """Indices [n + 1] into a grid of N steps, evenly apart: the starts of a student's n <= N steps, and the end."""
    return [round(k * num_steps / student_steps) for k in range(student_steps + 1)]
