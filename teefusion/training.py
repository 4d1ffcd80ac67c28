"""The distillation loop: a fused copy of the teacher regresses the teacher's effective velocity.

Runs alike in one process and under ``torchrun -m teefusion.training``; Accelerate drives both. Only the student is
in the engine: targets were computed before, so no teacher is held while training.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import logging
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from torch import Tensor

from teefusion.cache import open_shards
from teefusion.checkpoints import load_latest, save_checkpoint
from teefusion.distillation import ResidualMeter, distillation_loss
from teefusion.engine import Engine, StepResult
from teefusion.errors import InterruptedRunError, TeEFusionError, TrainingError
from teefusion.export import export_student
from teefusion.families import TextEmbeddings
from teefusion.files import write_json
from teefusion.fusion import Fusion, fuse, make_fusion, measure_sizes, pack
from teefusion.heldout import HeldOut
from teefusion.lineage import lineage
from teefusion.lora import make_trainable
from teefusion.manifests import Manifest, read_manifest
from teefusion.memory import MemoryMeter
from teefusion.onpolicy import OnPolicyStream, Velocity
from teefusion.pace import Pace
from teefusion.progress import Progress
from teefusion.prompts import load_prompt_set
from teefusion.sample_sheets import SampleSheet
from teefusion.settings import JOB_VARIABLE, Settings, TrainSettings, job_settings
from teefusion.shards import read_tensors
from teefusion.storage import Reader
from teefusion.strategies import make_strategy
from teefusion.stream import States, StateStream, read_null
from teefusion.teachers import load_teacher, load_transformer
from teefusion.tracking import Tracker
from teefusion.training_memory import describe_trial
from teefusion.weights import with_weights

log = logging.getLogger("teefusion.training")  # under torchrun this module is __main__
RESULT, DRY_RUN = "training.json", "dry-run.json"
_TRIED_STEPS = 2


def train(settings: Settings, *, prompts: Path, targets: str, output: Path) -> dict[str, Any]:
    """Train, save the student to ``output/student`` and the record to ``output/training.json``, written last.

    Continues from the newest checkpoint in ``output/checkpoints``. Raises IntegrityError for bad targets,
    TrainingError for losses that stay non-finite, InterruptedRunError after SIGTERM, TrackingError when MLflow cannot
    be reached at the start.
    """
    store = open_shards(settings, targets)
    manifest = read_manifest(store, teacher_revision=settings.teacher.revision)
    run = _Run(settings, manifest, store, output)
    try:
        sheet = SampleSheet(settings, manifest, store, shown=run.accelerator.is_main_process)
        rows = {str(row): prompt.text for row, prompt in enumerate(load_prompt_set(prompts).heldout[: len(sheet)], 1)}
        run.tracker.log_params({"samples": rows})
        with _stopped_by_sigterm(run):
            return run.complete(sheet)
    finally:
        run.tracker.close()
        # Accelerate keeps its settings for the process; the next training here may want others.
        AcceleratorState._reset_state(reset_partial_state=True)


def dry_run(settings: Settings, *, prompts: Path, targets: str, output: Path) -> dict[str, Any]:
    """Build everything, take a few steps, and return what they took; every rank has to. Leaves ``DRY_RUN`` in output.

    Writes no checkpoint, no student and nothing to MLflow. Raises as ``train``.
    """
    store = open_shards(settings, targets)
    manifest = read_manifest(store, teacher_revision=settings.teacher.revision)
    try:
        run = _Run(settings, manifest, store, output, tracked=False)
        record = run.try_out()
        if run.accelerator.is_main_process:
            write_json(output / DRY_RUN, record)
        return record
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


@dataclasses.dataclass
class _Position:
    """Where training stands; saved with each checkpoint."""

    step: int = 0
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    losses: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    skipped: int = 0


class _Run:
    """Everything a training run holds, built once."""

    def __init__(
        self,
        settings: Settings,
        manifest: Manifest,
        targets: Reader,
        output: Path,
        *,
        tracked: bool = True,
    ) -> None:
        self.settings, self.options, self.output = settings, settings.train, output
        self.lineage = lineage(settings, manifest)
        self.engine = Engine(self.options, cpu=settings.device == "cpu")
        self.accelerator, self.device = self.engine.accelerator, self.engine.device
        _check_world(self.options, self.accelerator.num_processes)
        set_seed(self.options.seed)
        self.tracker = Tracker.open(settings, enabled=self.accelerator.is_main_process and tracked)
        self.memory = MemoryMeter(self.device)
        transformer, self.family = load_transformer(settings.teacher)
        steps = settings.student_steps
        self.stream = StateStream(targets, manifest, "train", steps, shuffle_mb=self.options.shuffle_mb)
        strategy = settings.strategy
        self.heldout = HeldOut(
            StateStream(targets, manifest, "heldout", steps),
            self.device,
            (strategy.guidance_min, strategy.guidance_max),
        )
        self.null_P = read_null(targets, manifest).pooled_BP[0].to(self.device)
        self.fusion = _fusion(settings, transformer.time_text_embed, targets, manifest)
        self.gap_scale = self.heldout.measure_gaps(
            None if steps == strategy.num_steps else functools.partial(self._conditional, transformer.to(self.device))
        )
        self.position = _Position()
        self.engine.prepare(make_trainable(fuse(transformer, self.fusion), self.options.lora_rank).train())
        self.states = self.stream if self.options.states == "stored" else self._on_policy(targets, manifest)
        self.pace = Pace(settings, self.device, self.accelerator.num_processes)
        self._stopping = False
        self._skipped: list[str] = []  # names of the states of the steps skipped in a row

    def stop(self) -> None:
        """End after the step that is under way, with a checkpoint."""
        self._stopping = True

    def complete(self, sheet: SampleSheet) -> dict[str, Any]:
        """Train to the last step, export, and return the record. Raises InterruptedRunError when told to stop."""
        self.sheet = sheet
        saved = load_latest(self.engine, self.output / "checkpoints")
        self.position = _Position(**saved) if saved else _Position()
        resumed = self.position.step
        self.tracker.log_params({"fusion": self.fusion.model_dump(), **self.settings.content()})
        if resumed == 0:
            self._evaluate()
        else:
            log.info("continuing from step %d", resumed)
        self._loop()
        return self._export(resumed)

    def try_out(self) -> dict[str, Any]:
        """Take a few steps and say what they took. The first is left out: it is there to make and compile things."""
        batches, seconds = self._batches(), []
        for _ in range(1 + _TRIED_STEPS):
            self.memory.reset()
            started = time.monotonic()
            self._step(next(batches).to(self.device))
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.monotonic() - started)
        peak = self.accelerator.reduce(torch.tensor(float(self.memory.peak()), device=self.device), "max")
        cpu, step_seconds = self.device.type == "cpu", statistics.median(seconds[1:])
        return describe_trial(self.settings, cpu=cpu, measured_bytes=int(peak), step_seconds=step_seconds)

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
            lambda *at: self._drawn_velocity(self.engine.model, *at),
        )

    def _loop(self) -> None:
        options, batches = self.options, self._batches()
        started = time.monotonic() - self.position.seconds
        with self._progress() as progress:
            while self.position.step < options.steps:
                asked = time.monotonic()
                states = next(batches)
                self.pace.take(options.batch_size, time.monotonic() - asked)
                result = self._step(states.to(self.device))
                self.position.step += 1
                self.position.seconds = time.monotonic() - started
                self._after_step(result)
                residual = f"residual {self.position.curve[-1][1]:.3f}" if self.position.curve else ""
                progress.advance(1, note=residual, states=options.batch_size)

    def _batches(self) -> Iterator[States]:
        """This rank's share of the global batches, from the position on."""
        return self.states.batches(
            batch_size=self.options.batch_size,
            seed=self.options.seed,
            start=self.position.step,
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )

    def _step(self, states: States) -> StepResult:
        """One optimizer step. Raises TrainingError after too many in a row that were not finite."""
        parts = states.split(self.options.gradient_accumulation_steps)
        result = self.engine.step([functools.partial(self._loss, part) for part in parts])
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

    def _loss(self, states: States) -> Tensor:
        predicted = self._predict(self.engine.model, states)
        return distillation_loss(
            predicted,
            states.velocity_BCHW,
            states.gap_B,
            weighting=self.options.loss_weighting,
            scale=self.gap_scale,
        )

    def _predict(self, model: Any, states: States) -> Tensor:
        """The student's velocity [B, C, H, W] at the states, each with its own guidance."""
        return self._velocity(model, states.x_BCHW, states.sigma_B, states.guidance_B, states.text)

    def _velocity(self, model: Any, x_BCHW: Tensor, sigma_B: Tensor, s_B: Tensor, text: TextEmbeddings) -> Tensor:
        packed, tokens_BTE = pack(text.pooled_BP, self.null_P, s_B), text.tokens_BTE.to(self.engine.input_dtype)
        return self.family.velocity(model, x_BCHW, sigma_B * 1000.0, tokens_BTE, packed)

    def _drawn_velocity(self, model: Any, *at: Any) -> Tensor:
        """Where no loss follows: in the precision of training."""
        with self.accelerator.autocast():
            return self._velocity(model, *at)

    def _conditional(self, transformer: Any, states: States) -> Tensor:
        """The teacher's conditional velocity [B, C, H, W], by its transformer before it is fused."""
        text = TextEmbeddings(*(part.float() for part in states.text))
        return self.family.velocity(transformer, states.x_BCHW, states.sigma_B * 1000.0, *text)

    def _after_step(self, result: StepResult) -> None:
        options, step = self.options, self.position.step
        last = step == options.steps
        if (step % options.log_every == 0 or last) and result.finite:
            self._log_loss(result)
        if step % options.eval_every == 0 or last:
            self._evaluate()
        if options.sample_every and step % options.sample_every == 0 and not last:
            self._draw_samples(f"samples/step-{step:08d}.png")
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
        value = float(result.loss)
        self.position.losses.append((self.position.step, value))
        metrics = {
            "train/loss": value,
            "train/grad_norm": result.grad_norm,
            "train/learning_rate": self.engine.learning_rate(),
            "train/skipped_steps": float(self.position.skipped),
        } | self.pace.metrics()
        if self.device.type == "cuda":
            metrics["train/memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        self.tracker.log_metrics(metrics, step=self.position.step)

    def _evaluate(self) -> None:
        """Guidance residual of the averaged weights on the held-out states."""
        meter = self._residual()
        self.position.curve.append((self.position.step, meter.overall))
        metrics = {"heldout/guidance_residual": meter.overall}
        for kind, buckets in (("s", meter.by_guidance()), ("sigma", meter.by_sigma())):
            metrics |= {f"heldout/residual_{kind}_{b['low']:.2f}_{b['high']:.2f}": b["residual"] for b in buckets}
        self.tracker.log_metrics(metrics, step=self.position.step)

    def _residual(self) -> ResidualMeter:
        with self._averaged_student() as student:
            return self.heldout.residual(lambda at: student(at.x_BCHW, at.sigma_B, at.guidance_B, at.text))

    @contextlib.contextmanager
    def _averaged_student(self) -> Iterator[Velocity]:
        """The velocity of the averaged weights. On every rank alike, as ZeRO 3 needs all of them in a forward."""
        model = self.engine.unwrapped
        with self.engine.averaged_weights():
            model.eval()
            yield functools.partial(self._drawn_velocity, model)
            model.train()

    def _draw_samples(self, name: str) -> None:
        with self._averaged_student() as student:
            sheet = self.sheet.draw(student, self.device)
        if sheet is not None:
            self.tracker.log_image(sheet, name)

    def _export(self, resumed: int) -> dict[str, Any]:
        """Save the student and the record; the main process writes, the others take part and wait."""
        meter = self._residual()
        self._draw_samples("samples.png")
        with self.engine.averaged_weights():
            weights = self.engine.whole_weights()
        record: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            student = export_student(self.settings, self.fusion, weights, self.output / "student")
            record = self._record(meter, resumed) | {
                "parameters": sum(weight.numel() for weight in student.transformer.parameters()),
                "trained_parameters": sum(weight.numel() for weight in weights.values()),
            }
            write_json(self.output / RESULT, record)
            self.tracker.log_metrics({"guidance_residual": meter.overall}, step=self.position.step)
        self.accelerator.wait_for_everyone()
        return record

    def _record(self, meter: ResidualMeter, resumed: int) -> dict[str, Any]:
        position = self.position
        return {
            "guidance_residual": meter.overall,
            "residual_by_guidance": meter.by_guidance(),
            "residual_by_sigma": meter.by_sigma(),
            "residual_by_sigma_and_guidance": meter.by_sigma_and_guidance(),
            "residual_curve": position.curve,
            "loss_curve": position.losses,
            "steps": position.step,
            "skipped_steps": position.skipped,
            "resumed_from": resumed,
            "seconds": round(position.seconds, 3),
            "data_wait_seconds": round(self.pace.waited, 3),
            "ranks": self.accelerator.num_processes,
            "zero_stage": self.options.zero_stage,
            "fusion": self.fusion.model_dump(),
            "lineage": self.lineage,
        }

    def _progress(self) -> Progress:
        progress = Progress("train", total=self.options.steps, unit="step", enabled=self.accelerator.is_main_process)
        progress.advance(self.position.step)
        return progress


def _check_world(options: TrainSettings, ranks: int) -> None:
    ways = ranks * options.gradient_accumulation_steps
    if options.batch_size % ways:
        raise TrainingError(
            f"train.batch_size {options.batch_size} is not divisible by {ranks} ranks x "
            f"{options.gradient_accumulation_steps} accumulation steps = {ways}. Choose a multiple of {ways}."
        )


def _fusion(settings: Settings, stock: Any, targets: Reader, manifest: Manifest) -> Fusion:
    """The variant's constants; sizes are measured on the first block of training prompts."""
    block = read_tensors(targets, manifest.train.embeddings[0])
    pooled_BP, null_P = block["pooled"].float(), read_null(targets, manifest).pooled_BP[0].float()
    guidance_B = torch.linspace(settings.strategy.guidance_min, settings.strategy.guidance_max, len(pooled_BP))
    options = settings.fusion
    convention, embedded = options.convention, settings.teacher.embedded_guidance
    sizes = measure_sizes(
        stock,
        pooled_BP,
        null_P,
        guidance_B,
        variant=options.variant,
        convention=convention,
        embedded_guidance=embedded,
    )
    return make_fusion(
        options.variant,
        convention=convention,
        term_rms=sizes["term_rms"],
        temb_rms=sizes["temb_rms"],
        embedded_guidance=embedded,
    )


@contextlib.contextmanager
def _stopped_by_sigterm(run: _Run) -> Iterator[None]:
    """SIGTERM, as of a spot instance that is taken back, ends the run after the step under way; within the block."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
        return
    before = signal.signal(signal.SIGTERM, lambda *_: run.stop())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main() -> None:
    """Entry of a rank: ``torchrun --nproc-per-node N -m teefusion.training --settings FILE ...``."""
    parser = argparse.ArgumentParser(prog="python -m teefusion.training", description="One rank of the training stage.")
    parser.add_argument("--settings", type=Path, help=f"JSON of the run's settings; none is {JOB_VARIABLE}")
    parser.add_argument("--prompts", type=Path, required=True, help="folder of the prompt set")
    parser.add_argument("--targets", required=True, help="folder or s3:// URI of the target set")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the student")
    parser.add_argument("--dry-run", action="store_true", help="take a few steps and say what they took")
    arguments = parser.parse_args()
    from teefusion.logs import setup_logging

    setup_logging()
    try:
        settings = job_settings(arguments.settings)
        work = dry_run if arguments.dry_run else train
        work(settings, prompts=arguments.prompts, targets=arguments.targets, output=arguments.output)
    except TeEFusionError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
