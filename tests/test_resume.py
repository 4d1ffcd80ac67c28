"""Training that is interrupted goes on from its last good checkpoint, as if it had not been."""

from __future__ import annotations

import logging
import os
import signal
from typing import Any

import pytest

from teefusion.errors import InterruptedRunError
from teefusion.training_run import Run
from tests.training_job import Job, assert_close, assert_equal


def test_interrupted_it_resumes_and_ends_bit_identical(job: Job) -> None:
    job.train("whole")
    job.break_off("broken", after=5)  # checkpoints are at 2 and 4
    assert not (job.folder / "broken" / "training.json").exists()
    record = job.train("broken")
    assert record["resumed_from"] == 4
    assert_equal(job.weights("whole"), job.weights("broken"))


def test_a_corrupt_checkpoint_is_passed_over_for_the_one_before(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    job.train("whole")
    job.break_off("broken", after=5)
    path = next((job.folder / "broken" / "checkpoints" / "step-00000004").glob("tensors-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with caplog.at_level(logging.WARNING):
        record = job.train("broken")
    assert "step-00000004 is corrupt" in caplog.text
    assert "Using the one before it." in caplog.text
    assert record["resumed_from"] == 2
    assert_equal(job.weights("whole"), job.weights("broken"))


def test_a_checkpoint_stays_where_all_later_ones_are_corrupt(job: Job, caplog: pytest.LogCaptureFixture) -> None:
    job.break_off("broken", after=5)
    folder = job.folder / "broken" / "checkpoints"
    for path in folder.glob("step-*/tensors-*.safetensors"):
        path.write_bytes(b"")
    (folder / "notes.txt").write_text("a user's own")
    job.break_off("broken", {"train.checkpoint_every": 1, "train.keep_checkpoints": 1}, after=2)
    assert "There is none before it: training begins anew." in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["notes.txt", "step-00000002"]
    assert job.train("broken")["resumed_from"] == 2


def test_a_checkpoint_of_two_ranks_continues_on_one(job: Job) -> None:
    job.train("whole")
    job.break_off("moved", after=5)
    record = job.train("moved", {"train.num_processes": 2})
    assert record["resumed_from"] == 4
    assert_close(job.weights("whole"), job.weights("moved"), atol=1e-5)


def test_sigterm_leaves_a_checkpoint_to_continue_from(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    job.train("whole")
    with monkeypatch.context() as patch:
        step = Run.step

        def told_to_stop(self: Any, states: Any) -> Any:
            if self.position.step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(self, states)

        patch.setattr(Run, "step", told_to_stop)
        with pytest.raises(InterruptedRunError, match=r"at step 3 of 6; a checkpoint is in") as told:
            job.train("stopped")
    assert told.value.exit_code == 75
    assert job.train("stopped")["resumed_from"] == 3
    assert_equal(job.weights("whole"), job.weights("stopped"))
