"""DeepSpeed ZeRO takes the steps of plain data parallelism. Needs DeepSpeed (`make deepspeed`) and a compiler."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import ImageChops

from teefusion.engine import Engine
from teefusion.settings import Settings, TrainSettings
from tests.test_kills import killer
from tests.test_training_memory import TOLERANCE, tried
from tests.training_job import Job, assert_close, assert_equal, logged_pictures

Make = Callable[..., Settings]
MISSING = importlib.util.find_spec("deepspeed") is None or not shutil.which("c++")
TWO = {"train.num_processes": 2, "train.max_restarts": 0, "train.log_every": 1, "train.steps": 8}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(MISSING, reason="needs DeepSpeed and a C++ compiler"),
]


def losses(record: dict[str, Any]) -> torch.Tensor:
    return torch.tensor([loss for _, loss in record["loss_curve"]])


def test_every_stage_gives_the_losses_and_the_student_of_plain_data_parallelism(
    make_settings: Make, tmp_path: Path
) -> None:
    """With offload, too. In float32, on two gloo ranks: losses within 1e-5 of each other, averaged weights within 1e-5.

    Sheets of samples drawn on the way are the same but for rounding, two of 255 levels.
    """
    job = Job(make_settings, tmp_path)
    values = TWO | {"train.sample_every": 4}
    plain = job.train("plain", values)
    sheet = logged_pictures(make_settings(values))["samples/step-00000004.png"]
    for stage, offload in ((1, False), (2, False), (3, False), (3, True)):
        name = f"zero{stage}-{offload}"
        values |= {"train.zero_stage": stage, "train.offload": offload, "workdir": tmp_path / f"work-{name}"}
        record = job.train(name, values)
        drawn = logged_pictures(make_settings(values))["samples/step-00000004.png"]
        assert max(high for _, high in ImageChops.difference(drawn, sheet).getextrema()) <= 2
        assert record["zero_stage"] == stage
        assert record["ranks"] == 2
        assert record["parameters"] == plain["parameters"]
        torch.testing.assert_close(losses(record), losses(plain), rtol=1e-5, atol=1e-5)
        assert record["guidance_residual"] == pytest.approx(plain["guidance_residual"], rel=1e-4)
        assert_close(job.weights("plain"), job.weights(name), atol=1e-5)


def test_offloaded_states_are_stepped_by_deepspeeds_adam_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    for name, value in {
        "RANK": 0,
        "LOCAL_RANK": 0,
        "WORLD_SIZE": 1,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,
    }.items():
        monkeypatch.setenv(name, str(value))
    options = {"zero_stage": 2, "offload": True, "batch_size": 2, "warmup_steps": 0, "lr_schedule": "constant"}
    engine = Engine(TrainSettings(**options, learning_rate=1.0), cpu=True)
    try:
        engine.prepare(torch.nn.Linear(4, 1, bias=False))
        before = engine.whole_weights()["weight"]
        engine.step([lambda: engine.model(torch.ones(2, 4)).mean()])
        assert isinstance(engine._adam, DeepSpeedCPUAdam)
        assert_close(
            {"": before - 1.0}, {"": engine.whole_weights()["weight"]}, atol=1e-5
        )  # Adam's first step: the rate
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.distributed.destroy_process_group()


def test_a_checkpoint_is_taken_up_at_any_stage_by_any_number_of_ranks(make_settings: Make, tmp_path: Path) -> None:
    """Within 1e-5 of the run that was plain throughout; in bfloat16 DeepSpeed rounds elsewhere, hence float32."""
    job = Job(make_settings, tmp_path)
    values = {"train.lr_schedule": "constant", "train.ema_decay": 0.9, "train.learning_rate": 1e-3}
    plain = job.train("plain", values | {"train.steps": 8})
    for resumed, steps, stage, ranks in ((0, 3, 1, 2), (2, 5, 3, 2), (4, 7, 2, 1), (6, 8, 0, 1)):
        layout = {"train.steps": steps, "train.zero_stage": stage, "train.num_processes": ranks}
        layout |= {"train.offload": stage in (2, 3)}
        record = job.train("moved", values | layout | {"train.max_restarts": 0})
        assert (record["resumed_from"], record["zero_stage"], record["ranks"]) == (resumed, stage, ranks)
    assert record["guidance_residual"] == pytest.approx(plain["guidance_residual"], rel=1e-4)
    assert_close(job.weights("plain"), job.weights("moved"), atol=1e-5)


def test_a_rank_that_dies_is_started_again_and_the_end_is_the_same(make_settings: Make, tmp_path: Path) -> None:
    """SIGKILL of one rank: torchrun starts both again, from the checkpoint."""
    job = Job(make_settings, tmp_path)
    values = TWO | {"train.zero_stage": 3, "train.steps": 40, "train.checkpoint_every": 2}
    job.train("whole", values)
    with killer(tmp_path / "killed", [(0, 2)]):
        record = job.train("killed", values | {"train.max_restarts": 1})
    assert record["resumed_from"] > 0
    assert_equal(job.weights("whole"), job.weights("killed"))


def test_bfloat16_with_zero_keeps_float32_master_weights(make_settings: Make, tmp_path: Path) -> None:
    job = Job(make_settings, tmp_path)
    half = job.train("half", TWO | {"train.zero_stage": 2, "train.precision": "bfloat16"})
    plain = job.train("plain", TWO)
    assert all(value.dtype == torch.float32 for value in job.weights("half").values())
    torch.testing.assert_close(losses(half), losses(plain), rtol=0.05, atol=0.05)
    rounded = [torch.equal(value, value.bfloat16().float()) for value in job.weights("half").values()]
    assert not all(rounded)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_estimate_of_memory_is_what_a_dry_run_measures(
    make_settings: Make, tmp_path: Path, larger_teacher: Path, stage: int
) -> None:
    values = {"teacher.name": str(larger_teacher), "train.batch_size": 64, "targets.trajectories": 24}
    record = tried(make_settings(TWO | values | {"train.zero_stage": stage}), tmp_path, "dry")
    assert (record["zero_stage"], record["ranks"]) == (stage, 2)
    assert record["measured_bytes"] == pytest.approx(record["estimated_bytes"], rel=TOLERANCE)
