"""One guided teacher step. Every strategy is a pure function over one sigma grid, and counts its forwards.

    step(model, grid, x, i, s) -> Step         x: state at sigma_i, s: guidance scale a picture

The target of every strategy is the same: the effective velocity ``(x_next - x) / (sigma_next - sigma)``, in float32,
so that a student never knows which strategy taught it, and a new strategy is one new function.

Axes: B = pictures, C, H, W = latent channels and size. Guidance is diffusers' s: ``v = v_u + s * (v_c - v_u)``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from teefusion.settings import StrategySettings


class Denoiser(Protocol):
    """A teacher with its prompts bound: velocities at states of one batch."""

    def both(self, x_BCHW: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """Conditional and unconditional velocity, from one batched call that counts as two forwards a picture."""
        ...


@dataclass(frozen=True)
class Grid:
    """A sampling schedule: sigmas [N + 1] from noise to 0, and the network's timesteps [N] (1000 sigma)."""

    sigmas: Tensor
    timesteps: Tensor

    def __len__(self) -> int:
        return len(self.timesteps)

    def width(self, i: int) -> Tensor:
        """sigma_{i+1} - sigma_i, negative."""
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

    def forwards(self, num_steps: int) -> int:
        """Transformer forwards a picture over a whole trajectory (NFE)."""
        return self.forwards_a_step * num_steps


def guide(conditional: Tensor, unconditional: Tensor, s_B: Tensor) -> Tensor:
    """Classifier-free guidance, ``v_u + s (v_c - v_u)``, with one scale a picture (Ho & Salimans, arXiv 2207.12598)."""
    return unconditional + s_B.view(-1, 1, 1, 1) * (conditional - unconditional)


def euler_cfg(model: Denoiser, grid: Grid, x_BCHW: Tensor, i: int, s_B: Tensor) -> Step:
    """One Euler step along the guided velocity. Two forwards."""
    conditional, unconditional = model.both(x_BCHW, grid.timesteps[i])
    return Step(x_BCHW + grid.width(i) * guide(conditional, unconditional, s_B), conditional)


def effective_velocity(grid: Grid, x_BCHW: Tensor, x_next_BCHW: Tensor, i: int) -> Tensor:
    """The velocity of the Euler step that a strategy's step amounts to, float32."""
    return (x_next_BCHW.float() - x_BCHW.float()) / grid.width(i)


def make_strategy(settings: StrategySettings) -> Strategy:
    """The strategy that the settings name."""
    return {"euler_cfg": Strategy("euler_cfg", euler_cfg, forwards_a_step=2)}[settings.name]


def make_grid(scheduler: object, num_steps: int, device: str) -> Grid:
    """The grid of a diffusers flow-matching scheduler. Its tail carries the timestep shift twice, as in diffusers."""
    scheduler.set_timesteps(num_steps)  # type: ignore[attr-defined]
    sigmas: Tensor = scheduler.sigmas  # type: ignore[attr-defined]
    timesteps: Tensor = scheduler.timesteps  # type: ignore[attr-defined]
    return Grid(sigmas.to(device, torch.float32), timesteps.to(device, torch.float32))
