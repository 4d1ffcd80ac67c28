"""Walk the teacher's own trajectories and keep (state, sigma, guidance, effective velocity).

Trajectory ``j`` of a split takes prompt ``j mod P`` in hash order, and draws its noise, its guidance scale and the
steps it keeps from a generator seeded by the run's seed, the split, ``j`` and the prompt. So a trajectory is the same
wherever and whenever it is computed, and a shard is the same trajectories in the same batches.

Axes: B = trajectories in a batch, K = states kept of each, C, H, W = latent channels and size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from teefusion.errors import TrainingError
from teefusion.families import TextEmbeddings
from teefusion.manifests import Split
from teefusion.prompts import Prompt
from teefusion.settings import Settings
from teefusion.strategies import Grid, Step, Strategy, effective_velocity
from teefusion.teachers import Teacher


@dataclass(frozen=True)
class Draw:
    """What chance decides of one trajectory."""

    prompt: str
    seed: int
    noise_CHW: Tensor
    guidance: float
    steps_K: tuple[int, ...]


def draw(settings: Settings, split: Split, index: int, prompt: Prompt, latent_shape: tuple[int, int, int]) -> Draw:
    """Noise, guidance and kept steps of trajectory ``index``; depends on nothing but the arguments."""
    identity = f"{settings.targets.seed}/{split}/{index}/{prompt.digest}"
    seed = int.from_bytes(hashlib.sha256(identity.encode()).digest()[:8], "big") >> 1  # torch seeds are signed
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(latent_shape, generator=generator)
    low, high = settings.strategy.guidance_min, settings.strategy.guidance_max
    guidance = low + (high - low) * float(torch.rand((), generator=generator))
    order = torch.randperm(settings.strategy.num_steps, generator=generator)
    kept = sorted(order[: settings.targets.states_per_trajectory].tolist())
    return Draw(prompt.text, seed, noise, guidance, tuple(kept))


@torch.no_grad()
def walk(
    teacher: Teacher, strategy: Strategy, grid: Grid, text: TextEmbeddings, null: TextEmbeddings, draws: Sequence[Draw]
) -> dict[str, Tensor]:
    """Sample a batch of trajectories and return their kept states as rows [B * K, ...], trajectory by trajectory.

    Raises TrainingError naming prompt, seed and step when a velocity is not finite; such a row is never stored.
    """
    model = teacher.denoiser(text, null)
    x = torch.stack([item.noise_CHW for item in draws]).to(teacher.device)  # [B, C, H, W], float32 between steps
    s = torch.tensor([item.guidance for item in draws], device=teacher.device)
    rows = _Rows(grid, draws)
    for i in range(len(grid)):
        step = strategy.step(model, grid, x, i, s)
        rows.add(i, range(len(draws)), x, s, step)
        x = step.x_next_BCHW
    return rows.stacked()


@torch.no_grad()
def noise_pictures(
    teacher: Teacher,
    strategy: Strategy,
    grid: Grid,
    text: TextEmbeddings,
    null: TextEmbeddings,
    draws: Sequence[Draw],
    latents_BCHW: Tensor,
) -> dict[str, Tensor]:
    """Rows as of ``walk``, but noised latents of pictures: ``x = (1 - sigma) x0 + sigma noise`` at each kept step.

    Raises what ``walk`` raises.
    """
    rows = _Rows(grid, draws)
    for i in range(len(grid)):
        kept = [b for b, item in enumerate(draws) if i in item.steps_K]
        if not kept:
            continue
        index = torch.tensor(kept, device=teacher.device)
        noise = torch.stack([_noise(draws[b].seed + 1 + i, latents_BCHW.shape[1:]) for b in kept]).to(teacher.device)
        x = (1 - grid.sigmas[i]) * latents_BCHW[index] + grid.sigmas[i] * noise
        s = torch.tensor([draws[b].guidance for b in kept], device=teacher.device)
        rows.add(i, kept, x, s, strategy.step(teacher.denoiser(text.select(index), null), grid, x, i, s))
    return rows.stacked()


def _noise(seed: int, shape: Sequence[int]) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class _Rows:
    """Kept states of a batch, ordered by trajectory and step in the end."""

    def __init__(self, grid: Grid, draws: Sequence[Draw]) -> None:
        self._grid, self._draws = grid, draws
        self._rows: dict[tuple[int, int], dict[str, Tensor]] = {}

    def add(self, i: int, members: Sequence[int], x_BCHW: Tensor, s_B: Tensor, step: Step) -> None:
        """The states at step i of the batch's ``members`` that keep it. Raises TrainingError; see ``walk``."""
        velocity_BCHW = effective_velocity(self._grid, x_BCHW, step.x_next_BCHW, i)
        if not bool(torch.isfinite(velocity_BCHW).all()):
            bad = self._draws[members[int((~torch.isfinite(velocity_BCHW)).flatten(1).any(1).nonzero()[0])]]
            raise TrainingError(
                f"The teacher gave a non-finite velocity at step {i}, prompt {bad.prompt!r}, seed {bad.seed}, guidance "
                f"{bad.guidance:.2f}. Nothing of the shard was stored. Try --set teacher.dtype=float32 or a smaller "
                "strategy.guidance_max."
            )
        gap_B = (velocity_BCHW - step.conditional_BCHW).square().mean(dim=(1, 2, 3))
        for k, b in enumerate(members):
            if i in self._draws[b].steps_K:
                self._rows[b, i] = {
                    "x": x_BCHW[k],
                    "velocity": velocity_BCHW[k],
                    "sigma": self._grid.sigmas[i],
                    "step": torch.tensor(i, dtype=torch.int32),
                    "guidance": s_B[k],
                    "guidance_gap": gap_B[k],
                }

    def stacked(self) -> dict[str, Tensor]:
        """All rows, on the CPU."""
        ordered = [self._rows[key] for key in sorted(self._rows)]
        return {name: torch.stack([row[name] for row in ordered]).cpu() for name in ordered[0]}
