"""States that the student itself reaches, with the teacher's velocity there, made while it trains.

A student that samples meets its own errors, which no stored trajectory shows. Prompts and guidance scales come in the
order of the stored states; noise and the step are functions of seed and position, so a run continues exactly.

Axes: B = states in a batch, C, H, W = latent channels and size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from teefusion.families import TextEmbeddings
from teefusion.strategies import Strategy, effective_velocity
from teefusion.stream import States, StateStream
from teefusion.teachers import Teacher

Velocity = Callable[[Tensor, Tensor, Tensor, TextEmbeddings], Tensor]
"""The student's velocity [B, C, H, W] at x, sigma [B], guidance [B] and text."""


class OnPolicyStream:
    """Batches as ``StateStream.batches`` gives them; each costs up to N student forwards and one teacher step."""

    def __init__(
        self,
        stored: StateStream,
        teacher: Teacher,
        strategy: Strategy,
        num_steps: int,
        null: TextEmbeddings,
        student: Velocity,
    ) -> None:
        self._stored, self._teacher, self._strategy, self._student = stored, teacher, strategy, student
        self._grid = teacher.grid(num_steps)
        self._null = TextEmbeddings(*(part.to(teacher.device) for part in null))

    def batches(self, *, batch_size: int, seed: int, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[States]:
        """This rank's share of global batches ``start``, ``start + 1``, ... without end; see StateStream."""
        stored = self._stored.batches(batch_size=batch_size, seed=seed, start=start, rank=rank, ranks=ranks)
        for position, states in enumerate(stored, start):
            generator = torch.Generator().manual_seed((seed * 1_000_003 + position) * 2 + 1)
            noise = torch.randn(batch_size, *states.x_BCHW.shape[1:], generator=generator)[rank::ranks]
            i = int(torch.randint(len(self._grid), (), generator=generator))
            yield self._at_step(states.to(self._teacher.device), noise.to(self._teacher.device), i)

    @torch.no_grad()
    def _at_step(self, states: States, x_BCHW: Tensor, i: int) -> States:
        """Let the student walk from noise to step i, and ask the teacher there."""
        grid, s_B = self._grid, states.guidance_B
        text = TextEmbeddings(states.text.tokens_BTE, states.text.pooled_BP)
        for k in range(i):
            x_BCHW = x_BCHW + grid.width(k) * self._student(x_BCHW, grid.sigmas[k].expand(len(s_B)), s_B, text)
        step = self._strategy.step(self._teacher.denoiser(text, self._null), grid, x_BCHW, i, s_B)
        velocity_BCHW = effective_velocity(grid, x_BCHW, step.x_next_BCHW, i)
        gap_B = (velocity_BCHW - step.conditional_BCHW).square().mean(dim=(1, 2, 3))
        return dataclasses.replace(
            states,
            x_BCHW=x_BCHW,
            velocity_BCHW=velocity_BCHW,
            sigma_B=grid.sigmas[i].expand(len(s_B)),
            gap_B=gap_B,
            step_B=torch.full_like(states.step_B, i),
        )
