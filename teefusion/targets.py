"""Walk the teacher's own trajectories and keep (state, sigma, guidance, effective velocity).

Trajectory ``j`` of a split takes prompt ``j mod P`` in hash order, and draws its noise, its guidance scale and the
steps it keeps from a generator seeded by the run's seed, the split, ``j`` and the prompt. So a trajectory is the same
wherever and whenever it is computed, and a shard is the same trajectories in the same batches.

Axes: B = trajectories in a batch, K = states kept of each, C, H, W = latent channels and size.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from teefusion.errors import TrainingError
from teefusion.families import TextEmbeddings
from teefusion.images import CaptionedPictures
from teefusion.manifests import SCHEMA_VERSION, FileRecord, Manifest, Split, SplitRecord, target_key, write_manifest
from teefusion.progress import Progress
from teefusion.prompts import Prompt, PromptSet
from teefusion.settings import Settings
from teefusion.shards import finished, read_tensors, write_tensors
from teefusion.strategies import Grid, Step, Strategy, effective_velocity, make_strategy
from teefusion.teachers import Teacher, load_teacher
from teefusion.weights import with_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Draw:
    """What chance decides of one trajectory."""

    prompt: str
    seed: int
    noise_CHW: Tensor
    guidance: float
    steps_K: tuple[int, ...]


def generate_targets(settings: Settings, prompts: PromptSet, folder: Path) -> Manifest:
    """Make the target set in ``folder``; files that an earlier run finished are kept.

    Raises TeacherError, StorageError, and TrainingError for a teacher that gives non-finite velocities.
    """
    teacher = with_weights(load_teacher(settings.teacher, device=settings.device), settings.strategy)
    strategy = make_strategy(settings.strategy)
    null = finished(folder, "embeddings/null") or _write_embeddings(teacher, folder, "embeddings/null", [""])
    walker = _Walker(settings, teacher, strategy, folder, _text(read_tensors(folder, null)))
    train = walker.split("train", prompts.train, settings.targets.trajectories)
    heldout = walker.split("heldout", prompts.heldout, settings.targets.heldout_trajectories)
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        key=target_key(settings, prompts.sha256),
        teacher=settings.teacher.content() | {"family": teacher.family.name},
        strategy=settings.strategy.content(),
        targets=settings.targets.content(),
        prompt_set=prompts.sha256,
        sigmas=tuple(float(sigma) for sigma in walker.grid.sigmas),
        latent_shape=teacher.latent_shape,
        forwards=sum(record.forwards for record in (*train.states, *heldout.states)),
        null=null,
        train=train,
        heldout=heldout,
    )
    write_manifest(folder, manifest)
    return manifest


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


class _Walker:
    """The loop over shards, with all that is the same for each."""

    def __init__(
        self, settings: Settings, teacher: Teacher, strategy: Strategy, folder: Path, null: TextEmbeddings
    ) -> None:
        self.settings, self.teacher, self.strategy, self.folder, self.null = settings, teacher, strategy, folder, null
        self.grid = teacher.grid(settings.strategy.num_steps)
        images = settings.targets.images
        self.pictures = CaptionedPictures(Path(images)) if images else None

    def split(self, split: Split, prompts: Sequence[Prompt], trajectories: int) -> SplitRecord:
        """All shards and embedding blocks of a split; those that are there already are kept."""
        block = self.settings.targets.shard_trajectories
        used = prompts[: min(len(prompts), trajectories)]
        if self.pictures is not None:
            self.pictures.require(used)
        embeddings = [
            self._embeddings(f"embeddings/{split}-{k:05d}", used[k * block : (k + 1) * block])
            for k in range(-(-len(used) // block))
        ]
        states = []
        with Progress(f"targets ({split})", total=trajectories, unit="trajectory") as progress:
            for k in range(-(-trajectories // block)):
                indices = range(k * block, min((k + 1) * block, trajectories))
                name = f"states/{split}-{k:05d}"
                record = finished(self.folder, name)
                if record is None:
                    rows = self._shard(split, used, embeddings, indices)
                    record = write_tensors(self.folder, name, rows, forwards=self._price(rows, len(indices)))
                states.append(record)
                progress.advance(len(indices), forwards=record.forwards)
        return SplitRecord(states=tuple(states), embeddings=tuple(embeddings), prompts_per_block=block)

    def _price(self, rows: dict[str, Tensor], trajectories: int) -> int:
        """Forwards that a shard took: of whole trajectories, or of the kept steps alone."""
        if self.pictures is None:
            return trajectories * self.strategy.forwards(len(self.grid))
        return sum(map(self.strategy.forwards_at, rows["step"].tolist()))

    def _embeddings(self, name: str, prompts: Sequence[Prompt]) -> FileRecord:
        return finished(self.folder, name) or _write_embeddings(
            self.teacher, self.folder, name, [prompt.text for prompt in prompts]
        )

    def _shard(
        self, split: Split, prompts: Sequence[Prompt], embeddings: Sequence[FileRecord], indices: range
    ) -> dict[str, Tensor]:
        """The rows of trajectories ``indices``, in the stored types."""
        block, size = self.settings.targets.shard_trajectories, self.settings.targets.batch_size
        kept = self.settings.targets.states_per_trajectory
        dtype = getattr(torch, self.settings.targets.dtype)
        cache: dict[int, TextEmbeddings] = {}
        parts = []
        for start in range(indices.start, indices.stop, size):
            batch = range(start, min(start + size, indices.stop))
            chosen = [j % len(prompts) for j in batch]
            for b in {p // block for p in chosen} - cache.keys():
                cache[b] = _text(read_tensors(self.folder, embeddings[b]))
            text = TextEmbeddings(
                torch.stack([cache[p // block].tokens_BTE[p % block] for p in chosen]).to(self.teacher.device),
                torch.stack([cache[p // block].pooled_BP[p % block] for p in chosen]).to(self.teacher.device),
            )
            draws = [
                draw(self.settings, split, j, prompts[p], self.teacher.latent_shape)
                for j, p in zip(batch, chosen, strict=True)
            ]
            null = TextEmbeddings(*(part.to(self.teacher.device) for part in self.null))
            rows = self._rows(text, null, draws, [prompts[p] for p in chosen])
            rows["trajectory"] = torch.tensor(batch, dtype=torch.int64).repeat_interleave(kept)
            rows["prompt"] = torch.tensor(chosen, dtype=torch.int64).repeat_interleave(kept)
            parts.append(rows)
        shard = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return shard | {name: shard[name].to(dtype) for name in ("x", "velocity")}

    def _rows(
        self, text: TextEmbeddings, null: TextEmbeddings, draws: Sequence[Draw], prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:
        if self.pictures is None:
            return walk(self.teacher, self.strategy, self.grid, text, null, draws)
        _, height, width = self.teacher.latent_shape
        factor = int(self.teacher.pipeline.vae_scale_factor)
        latents = self.pictures.latents(self.teacher.pipeline, prompts, height=height * factor, width=width * factor)
        return noise_pictures(self.teacher, self.strategy, self.grid, text, null, draws, latents)


def _write_embeddings(teacher: Teacher, folder: Path, name: str, prompts: list[str]) -> FileRecord:
    text = teacher.encode(prompts)
    return write_tensors(folder, name, {"tokens": text.tokens_BTE.cpu(), "pooled": text.pooled_BP.cpu()})


def _text(tensors: dict[str, Tensor]) -> TextEmbeddings:
    return TextEmbeddings(tensors["tokens"], tensors["pooled"])
