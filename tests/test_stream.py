"""The order of states is a function of seed and position alone."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch

from teefusion.errors import IntegrityError, TrainingError
from teefusion.manifests import FileRecord, Manifest, SplitRecord
from teefusion.shards import write_tensors
from teefusion.storage import FolderStore
from teefusion.stream import StateStream

SHARDS, ROWS = 7, 10


@pytest.fixture
def stream(tmp_path: Path) -> StateStream:
    """Seventy rows whose sigma is their own number, in windows of three shards."""
    states = tuple(_shard(tmp_path, k) for k in range(SHARDS))
    tokens = torch.arange(4.0).view(4, 1, 1)
    embeddings = write_tensors(
        FolderStore(tmp_path), "embeddings/train-00000", {"tokens": tokens, "pooled": tokens[:, 0].clone()}
    )
    split = SplitRecord(states=states, embeddings=(embeddings,), prompts_per_block=4)
    manifest = Manifest.model_construct(train=split, sigmas=(1.0, 0.5, 0.0))
    stream = StateStream(FolderStore(tmp_path), manifest, "train")
    stream._window_shards = 3
    return stream


def _shard(folder: Path, k: int) -> FileRecord:
    numbers = torch.arange(k * ROWS, (k + 1) * ROWS)
    picture = numbers.float().view(-1, 1, 1, 1)
    rows = {"x": picture.clone(), "velocity": -picture, "sigma": numbers.float(), "guidance": numbers.float()}
    return write_tensors(
        FolderStore(folder),
        f"states/{k}",
        rows | {"guidance_gap": numbers.float(), "prompt": numbers % 4, "trajectory": numbers.clone(), "step": numbers},
    )


def numbers(stream: StateStream, count: int, **options: int) -> list[list[int]]:
    batches = stream.batches(batch_size=8, seed=3, **options)
    return [batch.sigma_B.int().tolist() for batch in islice(batches, count)]


def test_an_epoch_shows_no_state_twice(stream: StateStream) -> None:
    epoch = numbers(stream, 8)  # 70 rows make 8 batches of 8
    seen = [row for batch in epoch for row in batch]
    assert len(seen) == len(set(seen)) == 64
    assert seen != sorted(seen)


def test_epochs_differ_and_so_do_seeds(stream: StateStream) -> None:
    batches = numbers(stream, 16)
    assert batches[:8] != batches[8:]
    other = [batch.sigma_B.int().tolist() for batch in islice(stream.batches(batch_size=8, seed=4), 8)]
    assert batches[:8] != other


@pytest.mark.parametrize("start", [0, 1, 3, 5, 7, 8, 13, 24])
def test_starting_anywhere_continues_the_same_order(stream: StateStream, start: int) -> None:
    assert numbers(stream, 6, start=start) == numbers(stream, 30)[start : start + 6]


def test_ranks_share_each_global_batch_between_them(stream: StateStream) -> None:
    whole = numbers(stream, 10)
    parts = [numbers(stream, 10, rank=rank, ranks=2) for rank in (0, 1)]
    for k in range(10):
        assert sorted(parts[0][k] + parts[1][k]) == sorted(whole[k])
        assert not set(parts[0][k]) & set(parts[1][k])


def test_rows_stay_together_and_bring_their_own_text(stream: StateStream) -> None:
    batch = next(stream.batches(batch_size=8, seed=0))
    torch.testing.assert_close(batch.x_BCHW.flatten(), batch.sigma_B)
    torch.testing.assert_close(batch.velocity_BCHW.flatten(), -batch.sigma_B)
    torch.testing.assert_close(batch.text.pooled_BP.flatten(), batch.sigma_B % 4)


def test_in_order_gives_every_row_once(stream: StateStream) -> None:
    rows = [int(value) for batch in stream.in_order(batch_size=4) for value in batch.sigma_B]
    assert rows == list(range(SHARDS * ROWS))


def test_a_batch_larger_than_the_set_is_refused_with_the_arithmetic(stream: StateStream) -> None:
    with pytest.raises(TrainingError, match="batch_size is 71, but .* holds 70 training states"):
        next(stream.batches(batch_size=71, seed=0))


def test_windows_are_as_large_as_memory_is_given(tmp_path: Path, stream: StateStream) -> None:
    size = stream.split.states[0].bytes
    manifest = Manifest.model_construct(
        train=stream.split.model_copy(
            update={"states": tuple(r.model_copy(update={"bytes": size * 2**20}) for r in stream.split.states)}
        ),
        sigmas=(1.0, 0.5, 0.0),
    )
    for shuffle_mb, shards in ((1, 1), (size, 1), (2 * size, 2), (5 * size, 5)):
        assert StateStream(stream.store, manifest, "train", shuffle_mb=shuffle_mb)._window_shards == shards


def test_every_state_comes_once_an_epoch_whatever_the_windows(stream: StateStream) -> None:
    for shards in (1, 2, 7, 100):
        stream._window_shards = shards
        seen = [row for batch in islice(stream.batches(batch_size=7, seed=1), 10) for row in batch.sigma_B.tolist()]
        assert sorted(seen) == list(range(70))


def test_a_damaged_shard_stops_the_stream(stream: StateStream, tmp_path: Path) -> None:
    (tmp_path / "states" / "5.safetensors").write_bytes(b"bad")
    with pytest.raises(IntegrityError, match="states/5.safetensors has 3 bytes"):
        numbers(stream, 8)


def test_longer_steps_land_where_the_teachers_steps_landed(tmp_path: Path) -> None:
    """Two trajectories of six random steps, walked again in three, two and one."""
    torch.manual_seed(0)
    sigmas = torch.tensor([1.0, 0.9, 0.7, 0.55, 0.3, 0.1, 0.0])
    velocity = torch.randn(2, 6, 1, 2, 2)
    x = [torch.randn(2, 1, 2, 2)]
    for k in range(6):
        x.append(x[-1] + (sigmas[k + 1] - sigmas[k]) * velocity[:, k])
    rows = {
        "x": torch.stack(x[:-1], dim=1).flatten(0, 1),
        "velocity": velocity.flatten(0, 1),
        "sigma": sigmas[:-1].repeat(2),
        "guidance": torch.tensor([2.0, 5.0]).repeat_interleave(6),
        "guidance_gap": torch.ones(12),
        "prompt": torch.tensor([0, 1]).repeat_interleave(6),
        "trajectory": torch.tensor([0, 1]).repeat_interleave(6),
        "step": torch.arange(6).repeat(2),
    }
    states = write_tensors(FolderStore(tmp_path), "states/0", rows)
    tokens = torch.zeros(2, 1, 1)
    embeddings = write_tensors(
        FolderStore(tmp_path), "embeddings/0", {"tokens": tokens, "pooled": tokens[:, 0].clone()}
    )
    split = SplitRecord(states=(states,), embeddings=(embeddings,), prompts_per_block=4)
    manifest = Manifest.model_construct(train=split, sigmas=tuple(sigmas.tolist()))
    for steps, grid in ((3, [0, 2, 4, 6]), (2, [0, 3, 6]), (1, [0, 6])):
        (batch,) = StateStream(FolderStore(tmp_path), manifest, "train", steps).in_order(batch_size=64)
        assert len(batch) == 2 * steps
        got = batch.x_BCHW.view(2, steps, 1, 2, 2), batch.velocity_BCHW.view(2, steps, 1, 2, 2)
        for k in range(steps):
            torch.testing.assert_close(got[0][:, k], x[grid[k]])
            landed = got[0][:, k] + (sigmas[grid[k + 1]] - sigmas[grid[k]]) * got[1][:, k]
            torch.testing.assert_close(landed, x[grid[k + 1]])
        assert batch.guidance_B.tolist() == [2.0] * steps + [5.0] * steps
    whole = next(StateStream(FolderStore(tmp_path), manifest, "train", 6).in_order(batch_size=64))
    assert torch.equal(whole.velocity_BCHW, rows["velocity"])
    epoch = StateStream(FolderStore(tmp_path), manifest, "train", 3).batches(batch_size=3, seed=0)
    assert len({float(x) for batch in islice(epoch, 2) for x in batch.x_BCHW[:, 0, 0, 0]}) == 6
