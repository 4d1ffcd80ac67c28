"""Stream stored states in a fixed shuffled order, from any position, holding a few shards in memory.

The order is a function of (seed, step) alone: an epoch permutes the shards, takes them a window at a time, and
permutes the rows of a window. Every rank reads the same order and takes its own rows of each global batch, so a run
that stops and starts again, with any number of ranks, sees every state exactly as it would have.

Axes: B = states in a batch, C, H, W = latent channels and size, T = text tokens, E, P = token and pooled width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from teefusion.errors import TrainingError
from teefusion.families import TextEmbeddings
from teefusion.manifests import FileRecord, Manifest, Split, SplitRecord
from teefusion.shards import read_tensors
from teefusion.strategies import sub_grid

WINDOW_SHARDS = 16
_CACHED_BLOCKS = 64


@dataclass(frozen=True)
class States:
    """A batch of targets, float32, with the text of each row."""

    x_BCHW: Tensor
    velocity_BCHW: Tensor
    sigma_B: Tensor
    guidance_B: Tensor
    gap_B: Tensor
    text: TextEmbeddings

    def __len__(self) -> int:
        return len(self.sigma_B)

    def to(self, device: str | torch.device) -> States:
        """The same batch on another device."""
        return States(
            self.x_BCHW.to(device),
            self.velocity_BCHW.to(device),
            self.sigma_B.to(device),
            self.guidance_B.to(device),
            self.gap_B.to(device),
            TextEmbeddings(self.text.tokens_BTE.to(device), self.text.pooled_BP.to(device)),
        )


class StateStream:
    """Batches of a target set's split; files are verified when they are read.

    With ``student_steps`` below the teacher's steps, the states are those at which a student of so many steps starts
    one, and the velocity is the one that takes it to the next (see ``join_steps``).
    """

    def __init__(self, folder: Path, manifest: Manifest, split: Split, student_steps: int | None = None) -> None:
        self.folder = folder
        self.split: SplitRecord = getattr(manifest, split)
        self._sigmas = torch.tensor(manifest.sigmas)
        self._steps = len(manifest.sigmas) - 1
        self._grid = sub_grid(self._steps, student_steps) if student_steps not in (None, self._steps) else None
        self._blocks: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def batches(self, *, batch_size: int, seed: int, start: int = 0, rank: int = 0, ranks: int = 1) -> Iterator[States]:
        """This rank's share of global batches ``start``, ``start + 1``, ... without end.

        The last rows of an epoch that fill no batch are left out; which rows those are differs by epoch. Raises
        TrainingError when one epoch fills no batch, IntegrityError for a file that is not what the manifest says.
        """
        rows = sum(map(self._rows, self.split.states))
        per_epoch = rows // batch_size
        if per_epoch == 0:
            raise TrainingError(
                f"train.batch_size is {batch_size}, but {self.folder} holds {rows} training states. Lower "
                "train.batch_size, or raise targets.trajectories or targets.states_per_trajectory."
            )
        epoch, skip = divmod(start, per_epoch)
        while True:
            yield from self._epoch(epoch, skip, per_epoch, batch_size, seed, slice(rank, None, ranks))
            epoch, skip = epoch + 1, 0

    def in_order(self, *, batch_size: int) -> Iterator[States]:
        """Every state once, in stored order; the last batch may be smaller."""
        for record in self.split.states:
            rows = self._read(record)
            for part in torch.arange(_length(rows)).split(batch_size):
                yield self._states({name: value[part] for name, value in rows.items()})

    def _epoch(self, epoch: int, skip: int, count: int, batch_size: int, seed: int, share: slice) -> Iterator[States]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        shards = torch.randperm(len(self.split.states), generator=generator).tolist()
        rows: dict[str, Tensor] = {}
        position, first, given = 0, skip * batch_size, 0  # rows before `first` were seen before the interruption
        for at in range(0, len(shards), WINDOW_SHARDS):
            records = [self.split.states[k] for k in shards[at : at + WINDOW_SHARDS]]
            size = sum(map(self._rows, records))
            order = torch.randperm(size, generator=generator)  # drawn for skipped windows too, so the order holds
            kept = order[max(first - position, 0) :]
            position += size
            if len(kept):
                rows = _append(rows, self._window(records, kept))
            while _length(rows) >= batch_size and skip + given < count:
                batch = {name: value[:batch_size][share] for name, value in rows.items()}
                rows = {name: value[batch_size:] for name, value in rows.items()}
                given += 1
                yield self._states(batch)

    def _window(self, records: list[FileRecord], order: Tensor) -> dict[str, Tensor]:
        parts = [self._read(record) for record in records]
        return {name: torch.cat([part[name] for part in parts])[order] for name in parts[0]}

    def _rows(self, record: FileRecord) -> int:
        """How many states a file gives."""
        return record.rows if self._grid is None else record.rows // self._steps * (len(self._grid) - 1)

    def _read(self, record: FileRecord) -> dict[str, Tensor]:
        rows = read_tensors(self.folder, record)
        return rows if self._grid is None else join_steps(rows, self._sigmas, self._grid)

    def _states(self, rows: dict[str, Tensor]) -> States:
        return States(
            x_BCHW=rows["x"].float(),
            velocity_BCHW=rows["velocity"].float(),
            sigma_B=rows["sigma"],
            guidance_B=rows["guidance"],
            gap_B=rows["guidance_gap"],
            text=self._text(rows["prompt"].tolist()),
        )

    def _text(self, prompts: list[int]) -> TextEmbeddings:
        size = self.split.prompts_per_block
        rows = [(self._block(p // size), p % size) for p in prompts]
        return TextEmbeddings(
            torch.stack([block["tokens"][at] for block, at in rows]),
            torch.stack([block["pooled"][at] for block, at in rows]),
        )

    def _block(self, index: int) -> dict[str, Tensor]:
        """A block of prompt embeddings, from memory while it is in use."""
        if index not in self._blocks:
            self._blocks[index] = read_tensors(self.folder, self.split.embeddings[index])
            if len(self._blocks) > _CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(index)
        return self._blocks[index]


def join_steps(rows: dict[str, Tensor], sigmas: Tensor, grid: Sequence[int]) -> dict[str, Tensor]:
    """Rows of whole trajectories, N each and in order, as rows of longer steps between the indices ``grid``.

    The velocity of a longer step is ``(x_{k+m} - x_k) / (sigma_{k+m} - sigma_k)``: the mean of the velocities of its
    parts, weighted by their widths in sigma. Everything else is as at the longer step's start.
    """
    steps = len(sigmas) - 1
    widths_N = sigmas.diff()
    starts = torch.tensor(grid[:-1])
    joined = {}
    for name, value in rows.items():
        parts = value.view(-1, steps, *value.shape[1:])
        if name == "velocity":
            kept = [
                torch.tensordot(parts[:, a:b].float(), widths_N[a:b], dims=([1], [0])) / widths_N[a:b].sum()
                for a, b in pairwise(grid)
            ]
            joined[name] = torch.stack(kept, dim=1).flatten(0, 1)
        else:
            joined[name] = parts[:, starts].flatten(0, 1)
    return joined


def read_null(folder: Path, manifest: Manifest) -> TextEmbeddings:
    """The empty prompt's embeddings, batch 1."""
    tensors = read_tensors(folder, manifest.null)
    return TextEmbeddings(tensors["tokens"], tensors["pooled"])


def _length(rows: dict[str, Tensor]) -> int:
    return len(rows["sigma"]) if rows else 0


def _append(rows: dict[str, Tensor], more: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([rows[name], value]) for name, value in more.items()} if rows else more
