"""Training: learns, exports a student of the teacher's size; one process and torchrun alike."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from teefusion.distillation import ResidualMeter
from teefusion.errors import IntegrityError, SettingsError, TrainingError
from teefusion.manifests import write_manifest
from teefusion.prompts import load_prompt_set
from teefusion.settings import Settings
from teefusion.storage import FolderStore
from teefusion.students import load_student
from teefusion.target_sets import generate_targets
from teefusion.training_record import Position, training_record
from teefusion.training_run import Run
from tests.training_job import Job, assert_close, assert_equal, assert_shown, logged_pictures

Make = Callable[..., Settings]
BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def test_it_learns_and_the_record_says_so(job: Job) -> None:
    options = {"train.steps": 200, "train.learning_rate": 3e-3, "train.ema_decay": 0.9, "train.eval_every": 100}
    record = job.train("run", options)
    steps, residuals = zip(*record["residual_curve"], strict=True)
    assert steps == (0, 100, 200)
    assert residuals[2] < residuals[1] < residuals[0]
    assert record["guidance_residual"] == pytest.approx(residuals[2])
    assert record["loss_curve"][-1][1] < record["loss_curve"][0][1]


def test_the_student_has_the_teachers_parameters_and_moved_from_them(job: Job, tiny_teacher: Path) -> None:
    record = job.train("run")
    teacher = load_file(tiny_teacher / "transformer" / "diffusion_pytorch_model.safetensors")
    student = job.weights("run")
    assert {name: value.shape for name, value in student.items()} == {n: v.shape for n, v in teacher.items()}
    assert record["parameters"] == sum(v.numel() for n, v in teacher.items() if n != "pos_embed.pos_embed")
    assert any(not torch.equal(student[name], teacher[name]) for name in teacher)


def test_the_same_run_twice_gives_the_same_bits(job: Job) -> None:
    job.train("one")
    job.train("two")
    assert_equal(job.weights("one"), job.weights("two"))


def test_accumulated_micro_batches_take_the_same_steps(job: Job) -> None:
    job.train("whole")
    job.train("parts", {"train.gradient_accumulation_steps": 2})
    assert_close(job.weights("whole"), job.weights("parts"), atol=1e-5)


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_two_ranks_under_torchrun_take_the_same_steps(job: Job, device: str) -> None:
    job.train("one")
    record = job.train("two", {"train.num_processes": 2, "train.sample_every": 3, "device": device})
    assert record["ranks"] == 2
    assert sorted(logged_pictures(job.make())) == ["samples.png", "samples/step-00000003.png"]
    assert_close(job.weights("one"), job.weights("two"), atol=1e-5)


def test_ranks_that_would_train_alone_are_refused(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teefusion.training_run.resolve_device", lambda _: "not the cpu")  # Accelerate finds no ranks
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(TrainingError, match=r"2 ranks were started, but each would train by itself"):
        job.train("alone")


def test_zero_without_deepspeed_is_told_before_any_rank_starts(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teefusion.zero.is_deepspeed_available", lambda: False)
    monkeypatch.setattr("teefusion.launch._torchrun", lambda *_, **__: pytest.fail("ranks were started"))
    with pytest.raises(TrainingError, match=r"zero_stage is 2, but DeepSpeed is not installed.*make deepspeed"):
        job.train("zero", {"train.zero_stage": 2, "train.num_processes": 2})


def test_bfloat16_keeps_float32_master_weights(job: Job) -> None:
    record = job.train("half", {"train.precision": "bfloat16"})
    assert all(value.dtype == torch.float32 for value in job.weights("half").values())
    assert record["guidance_residual"] == record["guidance_residual"]  # not NaN


def test_the_exported_student_is_the_averaged_one_and_runs(job: Job) -> None:
    job.train("averaged", {"train.ema_decay": 0.9})
    job.train("raw", {"train.ema_decay": 0.0})
    averaged, raw = job.weights("averaged"), job.weights("raw")
    assert any(not torch.equal(averaged[name], raw[name]) for name in raw)
    student = load_student(job.folder / "averaged" / "student")
    assert len(student("star", guidance_scale=3.0, num_inference_steps=2).images) == 1


@pytest.mark.parametrize("variant", ["published", "paper", "linear", "unmodulated", "distill_cfg"])
def test_every_variant_trains_and_its_student_loads(job: Job, variant: str) -> None:
    record = job.train("run", {"fusion.variant": variant})
    assert record["fusion"]["variant"] == variant
    student = load_student(job.folder / "run" / "student")
    assert student.transformer.time_text_embed.fusion.variant == variant
    assert (sum(p.numel() for p in student.transformer.parameters())) == record["parameters"]


def test_a_student_of_fewer_steps_walks_every_other_point_of_its_teachers_grid(job: Job) -> None:
    job.targets = job.folder / "whole"  # with all of a trajectory's states
    settings = job.make({"targets.states_per_trajectory": 4, "targets.trajectories": 16})
    manifest = generate_targets(settings, load_prompt_set(job.prompts), FolderStore(job.targets))
    values = {"targets.states_per_trajectory": 4, "targets.trajectories": 16, "student.num_steps": 2}
    values |= {"train.steps": 60, "train.learning_rate": 3e-3, "train.ema_decay": 0.9}
    record = job.train("short", values)
    curve = [residual for _, residual in record["residual_curve"]]
    assert curve[-1] < curve[0]
    student = load_student(job.folder / "short" / "student")
    calls: list[int] = []
    student.transformer.register_forward_hook(lambda module, args, output: calls.append(len(output[0])))
    student("star", guidance_scale=3.0)
    assert calls == [1, 1]
    assert_shown(logged_pictures(job.make(values))["samples.png"], student, job, steps=2)
    expected = [manifest.sigmas[k] for k in (0, 2, 4)]
    assert student.scheduler.sigmas.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"student.num_steps": 5}, r"student.num_steps \(5\) is above strategy.num_steps \(4\)"),
        ({"student.num_steps": 2}, r"set targets.states_per_trajectory to strategy.num_steps \(4, not 3\)"),
        ({"student.num_steps": 0}, r"student.num_steps"),
    ],
)
def test_a_student_grid_that_the_targets_cannot_give_is_refused(
    make_settings: Make, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        make_settings(values)


def test_it_learns_on_the_students_own_states_and_resumes_there(job: Job) -> None:
    values = {"train.states": "student", "train.steps": 30, "train.learning_rate": 3e-3, "train.ema_decay": 0.5}
    values |= {"train.checkpoint_every": 10, "train.eval_every": 30}
    record = job.train("whole", values)
    curve = [residual for _, residual in record["residual_curve"]]
    assert curve[-1] < curve[0]
    job.break_off("broken", values, after=15)
    assert job.train("broken", values)["resumed_from"] == 10
    assert_equal(job.weights("whole"), job.weights("broken"))


def _poison(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """The targets of these steps are not finite."""
    step = Run.step

    def poisoned(self: Any, states: Any) -> Any:
        bad = float("nan") if self.position.step in steps else 1.0
        return step(self, dataclasses.replace(states, velocity_BCHW=states.velocity_BCHW * bad))

    monkeypatch.setattr(Run, "step", poisoned)


def test_a_loss_that_stays_non_finite_stops_the_run_and_names_the_states(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    _poison(monkeypatch, set(range(1, 100)))
    with pytest.raises(TrainingError, match=r"not finite in 3 steps in a row, up to step 4. .*: \d+/\d, \d+/\d, "):
        job.train("burnt", {"train.max_skipped_steps": 2})
    assert not (job.folder / "burnt" / "student").exists()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_step_that_is_not_finite_is_skipped_and_counted(
    job: Job, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    _poison(monkeypatch, {1, 3})
    record = job.train("skipping", {"train.max_skipped_steps": 1, "train.gradient_accumulation_steps": parts})
    assert (record["steps"], record["skipped_steps"]) == (6, 2)
    assert all(bool(torch.isfinite(value).all()) for value in job.weights("skipping").values())


def test_checkpointed_activations_take_the_same_steps(job: Job) -> None:
    job.train("whole")
    job.train("again", {"train.gradient_checkpointing": True})
    assert_close(job.weights("whole"), job.weights("again"), atol=1e-6)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_student_takes_the_same_steps(job: Job) -> None:
    ends = []
    for compiled in (False, True):
        settings, store = job.make({"train.compile": compiled}), FolderStore(job.targets)
        run = Run(settings, job.manifest, store, job.folder / "run", tracked=False)
        batches = run.batches()
        for _ in range(3):
            run.step(next(batches).to(run.device))
        ends.append(run.engine.whole_weights())
        AcceleratorState._reset_state(reset_partial_state=True)
    plain, fast = ends
    names = [name for name in plain if not torch.equal(plain[name], fast[name])]
    assert names, "compiled kernels round otherwise: none ran"
    assert_close(plain, fast, atol=1e-5)


@pytest.mark.parametrize("variant", ["affine", "distill_cfg"])
def test_a_lora_trains_few_parameters_and_its_student_has_the_teachers_alone(
    job: Job, tiny_teacher: Path, variant: str
) -> None:
    options = {"train.lora_rank": 2, "train.learning_rate": 1e-2, "train.ema_decay": 0.5, "fusion.variant": variant}
    record = job.train("whole", options)
    assert record["trained_parameters"] < record["parameters"] / 2
    student, teacher = (
        job.weights("whole"),
        load_file(tiny_teacher / "transformer" / "diffusion_pytorch_model.safetensors"),
    )
    added = {name for name in student if "scale_embedder" in name}
    assert {name: value.shape for name, value in student.items() if name not in added} == {
        name: value.shape for name, value in teacher.items()
    }
    assert bool(added) == (variant == "distill_cfg")
    loaded = load_student(job.folder / "whole" / "student")
    assert sum(weight.numel() for weight in loaded.transformer.parameters()) == record["parameters"]
    job.break_off("broken", options, after=5)
    assert job.train("broken", options)["resumed_from"] == 4
    assert_equal(job.weights("whole"), job.weights("broken"))


@pytest.mark.slow
@pytest.mark.skipif(not BITSANDBYTES, reason="needs bitsandbytes: pip install 'teefusion[adamw-8bit]'")
def test_eight_bit_adam_keeps_bytes_learns_as_adam_does_and_resumes_exactly(
    make_settings: Make, tmp_path: Path
) -> None:
    from tests.conftest import make_tiny_teacher

    teacher = tmp_path / "wider"  # bitsandbytes keeps weights of less than 4096 numbers in 32 bits
    make_tiny_teacher(teacher, head_width=32)
    values = {"teacher.name": str(teacher), "train.learning_rate": 1e-3, "train.ema_decay": 0.9, "train.steps": 60}
    values |= {"train.checkpoint_every": 20, "train.eval_every": 60}
    job = Job(lambda more=None: make_settings(values | (more or {})), tmp_path)
    plain, whole = job.train("plain"), job.train("whole", {"train.optimizer": "adamw_8bit"})
    assert whole["guidance_residual"] < whole["residual_curve"][0][1]
    assert whole["guidance_residual"] == pytest.approx(plain["guidance_residual"], rel=0.05)
    saved = load_file(next((tmp_path / "whole" / "checkpoints").glob("*40/tensors-00000.safetensors")))
    wide = [value for name, value in saved.items() if name.startswith("state1.") and value.numel() >= 4096]
    assert wide
    assert all(value.dtype == torch.uint8 for value in wide)
    job.break_off("broken", {"train.optimizer": "adamw_8bit"}, after=30)
    assert job.train("broken", {"train.optimizer": "adamw_8bit"})["resumed_from"] == 20
    assert_equal(job.weights("whole"), job.weights("broken"))


@pytest.mark.skipif(BITSANDBYTES, reason="bitsandbytes is installed")
def test_eight_bit_adam_without_its_library_is_refused(job: Job) -> None:
    with pytest.raises(TrainingError, match=r"needs the library bitsandbytes.*pip install teefusion\[adamw-8bit\]"):
        job.train("run", {"train.optimizer": "adamw_8bit"})


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"train.optimizer": "adamw_8bit", "train.zero_stage": 1}, SettingsError, "adamw_8bit and ZeRO do not go"),
        ({"train.offload": True}, SettingsError, "offload is ZeRO's: set zero_stage"),
    ],
)
def test_what_cannot_be_trained_with_is_refused(
    job: Job, values: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        job.train("run", values)


def test_targets_of_another_teacher_are_refused(job: Job) -> None:
    other = job.manifest.model_copy(update={"teacher": job.manifest.teacher | {"revision": "sha256:0000"}})
    write_manifest(FolderStore(job.targets), other)
    with pytest.raises(IntegrityError, match="at revision sha256:0000, this run distils"):
        job.train("run")


def test_a_damaged_shard_stops_training(job: Job) -> None:
    path = job.targets / "states" / "train-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(IntegrityError, match="train-00000.safetensors is corrupt"):
        job.train("run")


def test_targets_in_blocks_of_one_prompt_can_be_trained_on(make_settings: Make, tmp_path: Path) -> None:
    """The fused term of ``affine`` is zero at the least guidance scale, so its size shows at others alone."""
    job = Job(lambda overrides=None: make_settings({"targets.shard_trajectories": 1} | (overrides or {})), tmp_path)
    assert job.train("run")["fusion"]["divisor"] > 0


def test_a_student_without_finite_velocities_is_not_exported(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ResidualMeter, "overall", property(lambda _: math.nan))
    with pytest.raises(TrainingError, match=r"are not finite: this student cannot be used. Lower train.learning_rate"):
        job.train("run")
    assert not (job.folder / "run" / "student").exists()


def test_a_record_leaves_out_what_was_not_finite_on_the_way() -> None:
    position = Position(curve=[(0, math.nan), (3, 0.5)])
    record = training_record(position, ResidualMeter(1.0, 7.0))
    assert record["residual_curve"] == [(3, 0.5)]
