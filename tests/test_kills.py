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
from typing import Any

import pytest

from teefusion.errors import InterruptedRunError
from teefusion.files import read_json
from teefusion.settings import Settings, settings_from_json
from tests.training_job import Job, assert_equal

Make = Callable[..., Settings]


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as in every process of these tests: the last bits of sums depend on it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def run(settings: str, prompts: str, targets: str, output: str, begins: Any) -> None:
    """Body of a run's process, which says when all is built and its steps begin."""
    from teefusion import training, training_run

    load = training_run.load_latest
    training_run.load_latest = lambda *arguments: (load(*arguments), begins.set())[0]
    training.train(settings_from_json(settings), prompts=Path(prompts), targets=targets, output=Path(output))


def test_killed_at_thirty_random_moments_it_ends_with_the_same_bits(make_settings: Make, tmp_path: Path) -> None:
    job, chance = Job(make_settings, tmp_path), random.Random(1)
    values = {"train.steps": 150, "train.checkpoint_every": 1, "train.eval_every": 40, "train.ema_decay": 0.9}
    settings = make_settings(values).to_json()
    context = multiprocessing.get_context("forkserver")  # that has imported everything
    context.set_forkserver_preload(["teefusion.training", "diffusers.pipelines.stable_diffusion_3", "mlflow"])

    def start(name: str) -> tuple[multiprocessing.process.BaseProcess, Any]:
        begins = context.Event()
        paths = (str(job.prompts), str(job.targets), str(tmp_path / name))
        process = context.Process(target=run, args=(settings, *paths, begins))
        process.start()
        return process, begins

    def finish(name: str) -> None:
        process, _ = start(name)
        process.join()
        assert process.exitcode == 0

    finish("whole")
    for kill in range(30):
        process, begins = start("killed")
        if kill % 5:  # the others die while they are being built
            begins.wait()
        process.join(timeout=chance.uniform(0.0, 0.5))
        process.kill()
        process.join()
    finish("killed")
    assert read_json(tmp_path / "killed" / "training.json")["resumed_from"] > 0
    assert_equal(job.weights("whole"), job.weights("killed"))
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2  # nothing of the dead is left


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
    thread = threading.Thread(target=lambda: [_kill(output, rank, step) for rank, step in order], daemon=True)
    thread.start()
    yield
    thread.join(timeout=1)
    assert not thread.is_alive(), "the run ended before all were killed"


def _kill(output: Path, rank: int, step: int) -> None:
    _wait_for_step(output, step)
    while not (found := [pid for pid in _processes() if _is_rank(pid, output, rank)]):
        time.sleep(0.05)
    os.kill(found[0], signal.SIGKILL)


def _wait_for_step(output: Path, step: int) -> None:
    while not any(int(path.parent.name[5:]) >= step for path in output.glob("checkpoints/step-*/digests.json")):
        time.sleep(0.05)


def _processes() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def _is_rank(pid: int, output: Path, rank: int) -> bool:
    with contextlib.suppress(OSError):
        arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if f"--output={output}".encode() in arguments and b"torch.distributed.run" not in arguments:
            return f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    return False


def test_ranks_of_a_run_that_is_told_to_stop_leave_a_checkpoint_and_end(make_settings: Make, tmp_path: Path) -> None:
    job, output = Job(make_settings, tmp_path), tmp_path / "stopped"
    values = {"train.num_processes": 2, "train.steps": 60, "train.checkpoint_every": 2}
    job.train("whole", values)
    stop = threading.Thread(target=lambda: (_wait_for_step(output, 4), os.kill(os.getpid(), signal.SIGTERM)))
    stop.start()
    with pytest.raises(InterruptedRunError, match="run the same command again"):
        job.train("stopped", values)
    stop.join()
    assert not [pid for pid in _processes() for rank in (0, 1) if _is_rank(pid, output, rank)]
    assert job.train("stopped", values)["resumed_from"] >= 4
    assert_equal(job.weights("whole"), job.weights("stopped"))
