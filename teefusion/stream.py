"""Stream stored states in a fixed shuffled order, from any position, holding a few shards in memory.

The order is a function of (seed, step) alone: an epoch permutes the shards, takes them a window at a time, and
permutes the rows of a window. Every rank reads the same order and takes its own rows of each global batch, so a run
that stops and starts again, with any number of ranks, sees every state exactly as it would have. While a window is
used, the next one is read and verified by threads; memory holds these two, however large the set.

Axes: B = states in a batch, C, H, W = latent channels and size, T = text tokens, E, P = token and pooled width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from teefusion.errors import TrainingError
from teefusion.families import TextEmbeddings
from teefusion.manifests import FileRecord, Manifest, Split, SplitRecord
from teefusion.shards import read_tensors
from teefusion.storage import Reader
from teefusion.strategies import sub_grid

SHUFFLE_MB = 1024
_READERS = 4
_CACHED_BLOCKS = 64

Rows = dict[str, Tensor]


@dataclass(frozen=True)
class States:
    """A batch of targets with the text of each row; tensors of the stored types, until ``to`` makes them float32."""

    x_BCHW: Tensor
    velocity_BCHW: Tensor
    sigma_B: Tensor
    guidance_B: Tensor
    gap_B: Tensor
    text: TextEmbeddings
    trajectory_B: Tensor
    step_B: Tensor

    def __len__(self) -> int:
        return len(self.sigma_B)

    def to(self, device: str | torch.device) -> States:
        """The same batch on a device, in float32 there: it travels as small as it was stored."""
        return States(
            self.x_BCHW.to(device).float(),
            self.velocity_BCHW.to(device).float(),
            self.sigma_B.to(device),
            self.guidance_B.to(device),
            self.gap_B.to(device),
            TextEmbeddings(self.text.tokens_BTE.to(device), self.text.pooled_BP.to(device)),
            self.trajectory_B,
            self.step_B,
        )

    def split(self, parts: int) -> list[States]:
        """Micro-batches of equal size."""
        if parts == 1:
            return [self]
        return [
            States(
                self.x_BCHW[index],
                self.velocity_BCHW[index],
                self.sigma_B[index],
                self.guidance_B[index],
                self.gap_B[index],
                TextEmbeddings(*(part[index] for part in self.text)),
                self.trajectory_B[index],
                self.step_B[index],
            )
            for index in torch.arange(len(self)).chunk(parts)
        ]

    def names(self) -> str:
        """Which states these are, for messages: trajectory/step of each."""
        pairs = zip(self.trajectory_B.tolist(), self.step_B.tolist(), strict=True)
        return ", ".join(f"{trajectory}/{step}" for trajectory, step in pairs)


class _Window(NamedTuple):
    """Shards held together, and the order in which their rows are given."""

    records: Sequence[FileRecord]
    order: Sequence[int]
    opens_epoch: bool


class StateStream:
    """Batches of a target set's split; files are verified when they are read.

    With ``student_steps`` below the teacher's steps, the states are those at which a student of so many steps starts
    one, and the velocity is the one that takes it to the next (see ``join_steps``).
    """

    def __init__(
        self,
        store: Reader,
        manifest: Manifest,
        split: Split,
        student_steps: int | None = None,
        *,
        shuffle_mb: int = SHUFFLE_MB,
    ) -> None:
        self.store = store
        self.split: SplitRecord = getattr(manifest, split)
        largest = max(record.bytes for record in self.split.states)
        self._window_shards = max(1, shuffle_mb * 2**20 // largest)
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
                f"train.batch_size is {batch_size}, but {self.store.uri} holds {rows} training states. Lower "
                "train.batch_size, or raise targets.trajectories or targets.states_per_trajectory."
            )
        epoch, skip = divmod(start, per_epoch)
        pending: list[tuple[Rows, int]] = []
        for window, shards in self._read_ahead(self._windows(seed, epoch, skip * batch_size)):
            if window.opens_epoch:
                pending = []
            members = [(shard, k) for shard in shards for k in range(_length(shard))]
            pending += [members[k] for k in window.order]
            while len(pending) >= batch_size:
                yield self._states(_gather(pending[:batch_size][rank::ranks]))
                pending = pending[batch_size:]

    def in_order(self, *, batch_size: int) -> Iterator[States]:
        """Every state once, in stored order; the last batch may be smaller."""
        windows = (_Window([record], [], opens_epoch=False) for record in self.split.states)
        for _, (rows,) in self._read_ahead(windows):
            for part in torch.arange(_length(rows)).split(batch_size):
                yield self._states({name: value[part] for name, value in rows.items()})

    def _windows(self, seed: int, epoch: int, first: int) -> Iterator[_Window]:
        """Windows of this epoch and all after it; of this one without its first rows, seen before an interruption."""
        for number in count(epoch):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            shards = torch.randperm(len(self.split.states), generator=generator).tolist()
            position, opens = 0, True
            for at in range(0, len(shards), self._window_shards):
                records = [self.split.states[k] for k in shards[at : at + self._window_shards]]
                size = sum(map(self._rows, records))
                order = torch.randperm(size, generator=generator).tolist()  # of skipped windows too: the order holds
                kept = order[max(first - position, 0) :]
                position += size
                if kept:
                    yield _Window(records, kept, opens)
                    opens = False
            first = 0

    def _read_ahead(self, windows: Iterable[_Window]) -> Iterator[tuple[_Window, list[Rows]]]:
        """Each window with its shards, read and verified while the one before is in use."""
        readers = ThreadPoolExecutor(_READERS, thread_name_prefix="shards")
        try:
            before: tuple[_Window, list[Future[Rows]]] | None = None
            for window in windows:
                coming = [readers.submit(self._read, record) for record in window.records]
                if before is not None:
                    yield before[0], [future.result() for future in before[1]]
                before = window, coming
            if before is not None:
                yield before[0], [future.result() for future in before[1]]
        finally:
            readers.shutdown(wait=False, cancel_futures=True)

    def _rows(self, record: FileRecord) -> int:
        """How many states a file gives."""
        return record.rows if self._grid is None else record.rows // self._steps * (len(self._grid) - 1)

    def _read(self, record: FileRecord) -> dict[str, Tensor]:
        rows = read_tensors(self.store, record)
        return rows if self._grid is None else join_steps(rows, self._sigmas, self._grid)

    def _states(self, rows: dict[str, Tensor]) -> States:
        return States(
            x_BCHW=rows["x"],
            velocity_BCHW=rows["velocity"],
            sigma_B=rows["sigma"],
            guidance_B=rows["guidance"],
            gap_B=rows["guidance_gap"],
            text=self._text(rows["prompt"].tolist()),
            trajectory_B=rows["trajectory"],
            step_B=rows["step"],
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
            self._blocks[index] = read_tensors(self.store, self.split.embeddings[index])
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


def read_null(store: Reader, manifest: Manifest) -> TextEmbeddings:
    """The empty prompt's embeddings, batch 1."""
    tensors = read_tensors(store, manifest.null)
    return TextEmbeddings(tensors["tokens"], tensors["pooled"])


def _length(rows: Rows) -> int:
    return len(rows["sigma"])


def _gather(members: Sequence[tuple[Rows, int]]) -> Rows:
    """Single rows of several shards as one batch.

    Copied by numpy, which takes one thread: torch takes all cores, and they wait for one another while files are read.
    """
    shards = {id(rows): rows for rows, _ in members}
    batch = {}
    for name, example in members[0][0].items():
        flat = {key: rows[name].view(torch.uint8).numpy() for key, rows in shards.items()}
        size = len(flat[id(members[0][0])]) // len(example)  # entries of a row: the bytes of a number, else 1
        parts = [flat[id(rows)][k * size : (k + 1) * size] for rows, k in members]
        batch[name] = torch.from_numpy(np.concatenate(parts)).view(example.dtype)
    return batch
