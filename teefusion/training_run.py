"""A run of training: steps with their evaluations, samples and checkpoints, and the student in the end."""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from teefusion.checkpoints import load_latest, save_checkpoint
from teefusion.devices import resolve_device
from teefusion.distillation import ResidualMeter
from teefusion.engine import Engine, StepResult
from teefusion.errors import InterruptedRunError, TrainingError
from teefusion.export import export_student
from teefusion.files import write_json
from teefusion.heldout import HeldOut
from teefusion.lineage import library_versions, lineage
from teefusion.manifests import Manifest
from teefusion.memory import MemoryMeter
from teefusion.onpolicy import OnPolicyStream
from teefusion.pace import Pace
from teefusion.progress import Progress
from teefusion.sample_sheets import SampleSheet
from teefusion.settings import Settings, TrainSettings
from teefusion.storage import Reader
from teefusion.strategies import make_strategy
from teefusion.stream import States, StateStream, read_null
from teefusion.teachers import load_teacher
from teefusion.tracking import Tracker
from teefusion.training_record import RESULT, Position, loss_metrics, residual_metrics, training_record
from teefusion.training_student import TrainingStudent
from teefusion.weights import with_weights

log = logging.getLogger(__name__)


class Run:
    """Everything a training run holds, built once."""

    def __init__(
        self, settings: Settings, manifest: Manifest, targets: Reader, output: Path, *, tracked: bool = True
    ) -> None:
        self.settings, self.options, self.output = settings, settings.train, output
        self.lineage = lineage(settings, manifest)
        self.engine = Engine(self.options, cpu=resolve_device(settings.device) == "cpu")
        self.accelerator, self.device = self.engine.accelerator, self.engine.device
        _check_world(self.options, self.accelerator.num_processes)
        set_seed(self.options.seed)
        self.tracker = Tracker.open(settings, enabled=self.accelerator.is_main_process and tracked)
        self.memory = MemoryMeter(self.device)
        steps, strategy = settings.student_steps, settings.strategy
        self.stream = StateStream(targets, manifest, "train", steps, shuffle_mb=self.options.shuffle_mb)
        self.heldout = HeldOut(
            StateStream(targets, manifest, "heldout", steps),
            self.device,
            (strategy.guidance_min, strategy.guidance_max),
        )
        self.student = TrainingStudent(settings, self.engine, manifest, targets, self.heldout)
        self.states = self.stream if self.options.states == "stored" else self._on_policy(targets, manifest)
        self.position = Position()
        self.pace = Pace(settings, self.device, self.accelerator.num_processes)
        self._stopping = False
        self._skipped: list[str] = []  # names of the states of the steps skipped in a row

    def stop(self) -> None:
        """End after the step that is under way, with a checkpoint."""
        self._stopping = True

    def complete(self, sheet: SampleSheet) -> dict[str, Any]:
        """Train to the last step, export, and return the record. Raises InterruptedRunError when told to stop."""
        saved = load_latest(self.engine, self.output / "checkpoints")
        self.position = Position(**saved) if saved else Position()
        resumed = self.position.step
        self.tracker.log_params({"fusion": self.student.fusion.model_dump(), **self.settings.content()})
        if resumed == 0:
            self._evaluate()
        else:
            log.info("continuing from step %d", resumed)
        self._loop(sheet)
        return self._export(sheet, resumed)

    def batches(self) -> Iterator[States]:
        """This rank's share of the global batches, from the position on."""
        return self.states.batches(
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            start=self.position.step,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )

    def step(self, states: States) -> StepResult:
        """One optimizer step on states that are on the device. Raises TrainingError after too many in a row that were
        not finite.
        """
        parts = states.split(self.options.gradient_accumulation_steps)
        result = self.engine.step([functools.partial(self.student.loss, part) for part in parts])
        if result.finite:
            self._skipped.clear()
            return result
        self.position.skipped += 1
        self._skipped.append(states.names())
        number = self.position.step + 1
        log.warning("step %d is skipped: its loss or gradient is not finite", number)
        if len(self._skipped) > self.options.max_skipped_steps:
            raise TrainingError(
                f"The loss or gradient was not finite in {len(self._skipped)} steps in a row, up to step "
                f"{number}. The states of the last of them (trajectory/step): {self._skipped[-1]}. The "
                f"last checkpoint in {self.output}/checkpoints is good; lower train.learning_rate (or use "
                "train.precision=float32) and run again."
            )
        return result

    def _on_policy(self, targets: Reader, manifest: Manifest) -> OnPolicyStream:
        """The student's own states; the teacher is held beside it, without text encoders."""
        settings = self.settings
        encoders = {name: None for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        teacher = load_teacher(settings.teacher, device=str(self.device), **encoders)
        return OnPolicyStream(
            self.stream,
            with_weights(teacher, settings.strategy),
            make_strategy(settings.strategy),
            settings.strategy.num_steps,
            read_null(targets, manifest),
            self.student.sampled(self.engine.model),
        )

    def _loop(self, sheet: SampleSheet) -> None:
        options, batches = self.options, self.batches()
        started = time.monotonic() - self.position.seconds
        main = self.accelerator.is_main_process
        with Progress("train", total=options.steps, unit="step", enabled=main) as progress:
            progress.advance(self.position.step)
            while self.position.step < options.steps:
                asked = time.monotonic()
                states = next(batches)
                self.pace.take(options.batch_size, time.monotonic() - asked)
                result = self.step(states.to(self.device))
                self.position.step += 1
                self.position.seconds = time.monotonic() - started
                self._after_step(result, sheet)
                residual = f"residual {self.position.curve[-1][1]:.3f}" if self.position.curve else ""
                progress.advance(1, note=residual, states=options.batch_size)

    def _after_step(self, result: StepResult, sheet: SampleSheet) -> None:
        options, step = self.options, self.position.step
        last = step == options.steps
        if (step % options.log_every == 0 or last) and result.finite:
            self._log_loss(result)
        if step % options.eval_every == 0 or last:
            self._evaluate()
        if options.sample_every and step % options.sample_every == 0 and not last:
            self._draw(sheet, f"samples/step-{step:08d}.png")
        stopping = self._anyone_stopping()
        if (step % options.checkpoint_every == 0 or stopping) and not last:
            position = dataclasses.asdict(self.position)
            save_checkpoint(
                self.engine, self.output / "checkpoints", step, position=position, keep=options.keep_checkpoints
            )
        if stopping and not last:
            raise InterruptedRunError(
                f"Told to stop (SIGTERM) at step {step} of {options.steps}; a checkpoint is in "
                f"{self.output}/checkpoints. Run the same command again to continue."
            )

    def _anyone_stopping(self) -> bool:
        """Whether any rank was told to stop: all of them write the checkpoint."""
        if self.accelerator.num_processes == 1:
            return self._stopping
        told = torch.tensor(float(self._stopping), device=self.device)
        return float(self.accelerator.reduce(told, "sum")) > 0

    def _log_loss(self, result: StepResult) -> None:
        self.position.losses.append((self.position.step, float(result.loss)))
        metrics = loss_metrics(self.position, result, self.engine.learning_rate()) | self.pace.metrics()
        if self.device.type == "cuda":
            metrics["train/memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.tracker.log_metrics(metrics, step=self.position.step)

    def _evaluate(self) -> None:
        meter = self._residual()
        self.position.curve.append((self.position.step, meter.overall))
        self.tracker.log_metrics(residual_metrics(meter), step=self.position.step)

    def _residual(self) -> ResidualMeter:
        """Guidance residual of the averaged weights on the held-out states."""
        with self.student.averaged() as velocity:
            return self.heldout.residual(lambda at: velocity(at.x_BCHW, at.sigma_B, at.guidance_B, at.text))

    def _draw(self, sheet: SampleSheet, name: str) -> None:
        """Log a sheet of the averaged weights' pictures."""
        with self.student.averaged() as velocity:
            picture = sheet.draw(velocity, self.device)
        if picture is not None:
            self.tracker.log_image(picture, name)

    def _export(self, sheet: SampleSheet, resumed: int) -> dict[str, Any]:
        """Save the student and the record; the main process writes, the others take part and wait."""
        meter = self._residual()
        if not math.isfinite(meter.overall):
            raise TrainingError(
                "The averaged weights give velocities on held-out states that are not finite: this student cannot be "
                "used. Lower train.learning_rate, or train in float32 (train.precision), and run again."
            )
        self._draw(sheet, "samples.png")
        with self.engine.averaged_weights():
            weights = self.engine.whole_weights()
        record: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            student = export_student(self.settings, self.student.fusion, weights, self.output / "student")
            record = training_record(self.position, meter) | {
                "resumed_from": resumed,
                "data_wait_seconds": round(self.pace.waited, 3),
                "ranks": self.accelerator.num_processes,
                "zero_stage": self.options.zero_stage,
                "fusion": self.student.fusion.model_dump(),
                "lineage": self.lineage,
                "libraries": library_versions(),
                "parameters": sum(weight.numel() for weight in student.transformer.parameters()),
                "trained_parameters": sum(weight.numel() for weight in weights.values()),
            }
            write_json(self.output / RESULT, record)
            self.tracker.log_metrics({"guidance_residual": meter.overall}, step=self.position.step)
        self.accelerator.wait_for_everyone()
        return record


def _check_world(options: TrainSettings, ranks: int) -> None:
    started = int(os.environ.get("WORLD_SIZE", 1))
    if ranks != started:
        raise TrainingError(
            f"{started} ranks were started, but each would train by itself: Accelerate sees {ranks}. Unset the "
            "ACCELERATE_* variables, and let torchrun start the ranks."
        )
    ways = ranks * options.gradient_accumulation_steps
    if options.batch_size % ways:
        raise TrainingError(
            f"train.batch_size {options.batch_size} is not divisible by {ranks} ranks x "
            f"{options.gradient_accumulation_steps} accumulation steps = {ways}. Choose a multiple of {ways}."
        )
