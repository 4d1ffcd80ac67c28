"""A run that is killed, whole or one rank of it, at any moment and many times, ends with the bits it would have had."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from teefusion.files import read_json
from teefusion.settings import Settings, settings_from_json
from tests.test_training import Job, assert_equal

Make = Callable[..., Settings]


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as in every process of these tests: the last bits of sums depend on it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(settings: str, prompts: str, targets: str, output: str) -> None:
    """Body of a run's process."""
    from teefusion.training import train

    train(settings_from_json(settings), prompts=Path(prompts), targets=targets, output=Path(output))


@pytest.mark.slow
def test_killed_at_thirty_random_moments_it_ends_with_the_same_bits(make_settings: Make, tmp_path: Path) -> None:
    job, chance = Job(make_settings, tmp_path), random.Random(1)
    values = {"train.steps": 120, "train.checkpoint_every": 1, "train.eval_every": 40, "train.ema_decay": 0.9}
    settings = make_settings(values).to_json()
    context = multiprocessing.get_context("forkserver")  # that has imported everything
    context.set_forkserver_preload(["teefusion.training", "diffusers.pipelines.stable_diffusion_3", "mlflow"])

    def start(name: str) -> multiprocessing.process.BaseProcess:
        paths = (str(job.prompts), str(job.targets), str(tmp_path / name))
        process = context.Process(target=run, args=(settings, *paths))
        process.start()
        return process

    def finish(name: str) -> None:
        process = start(name)
        process.join()
        assert process.exitcode == 0

    finish("whole")
    kills = 0
    while kills < 30:
        process = start("killed")
        process.join(timeout=chance.uniform(0.5, 4.0))
        if process.pid and process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.join()
    finish("killed")
    assert read_json(tmp_path / "killed" / "training.json")["resumed_from"] > 0
    assert_equal(job.weights("whole"), job.weights("killed"))


@pytest.mark.slow
def test_each_of_two_ranks_is_killed_and_the_run_ends_with_the_same_bits(make_settings: Make, tmp_path: Path) -> None:
    job = Job(make_settings, tmp_path)
    values = {"train.num_processes": 2, "train.steps": 60, "train.checkpoint_every": 2}
    job.train("whole", values)
    with killer(tmp_path / "killed", [(0, 2), (1, 20)]):
        record = job.train("killed", values | {"train.max_restarts": 2})
    assert record["resumed_from"] >= 20
    assert_equal(job.weights("whole"), job.weights("killed"))


@contextlib.contextmanager
def killer(output: Path, order: Sequence[tuple[int, int]]) -> Iterator[None]:
    """Kills ranks of the run in ``output``: each (rank, step) once there is a checkpoint of that step or later."""
    thread = threading.Thread(target=lambda: [_kill(output, rank, step) for rank, step in order])
    thread.start()
    yield
    thread.join()


def _kill(output: Path, rank: int, step: int) -> None:
    while not any(int(path.parent.name[5:]) >= step for path in output.glob("checkpoints/step-*/digests.json")):
        time.sleep(0.05)
    while not (found := [pid for pid in _processes() if _is_rank(pid, output, rank)]):
        time.sleep(0.05)
    os.kill(found[0], signal.SIGKILL)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _is_rank(pid: int, output: Path, rank: int) -> bool:
    with contextlib.suppress(OSError):
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if f"--output={output}".encode() in arguments and b"torch.distributed.run" not in arguments:
            return f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False
