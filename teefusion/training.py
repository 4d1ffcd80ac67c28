"""The distillation loop: a fused copy of the teacher regresses the teacher's effective velocity.

Runs alike in one process and under ``torchrun -m teefusion.training``; Accelerate drives both. Only the student is
in the engine: targets were computed before, so no teacher is held while training.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import set_seed
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor

from teefusion.cache import open_shards
from teefusion.checkpoints import load_latest, save_checkpoint
from teefusion.devices import plain_attention
from teefusion.distillation import ResidualMeter, distillation_loss
from teefusion.errors import TeEFusionError, TrainingError
from teefusion.families import TextEmbeddings
from teefusion.files import write_json
from teefusion.fusion import Fusion, fuse, make_fusion, measure_sizes, pack
from teefusion.manifests import Manifest, read_manifest
from teefusion.onpolicy import OnPolicyStream
from teefusion.progress import Progress
from teefusion.prompts import load_prompt_set
from teefusion.settings import JOB_VARIABLE, Settings, TrainSettings, job_settings
from teefusion.shards import read_tensors
from teefusion.storage import Reader
from teefusion.strategies import make_strategy, sub_grid
from teefusion.stream import States, StateStream, read_null
from teefusion.students import make_student, save_student
from teefusion.teachers import Teacher, load_teacher, load_transformer
from teefusion.tracking import Tracker
from teefusion.weights import with_weights

log = logging.getLogger("teefusion.training")  # under torchrun this module is __main__
RESULT = "training.json"
_EVAL_BATCH = 64
_SAMPLE_PROMPTS = 4


def train(settings: Settings, *, prompts: Path, targets: str, output: Path) -> dict[str, Any]:
    """Train, save the student to ``output/student`` and the record to ``output/training.json``, written last.

    Continues from the newest checkpoint in ``output/checkpoints``. Raises IntegrityError for bad targets,
    TrainingError for a loss that is not finite, TrackingError when MLflow cannot be reached at the start.
    """
    store = open_shards(settings, targets)
    manifest = read_manifest(store, teacher_revision=settings.teacher.revision)
    samples = [prompt.text for prompt in load_prompt_set(prompts).heldout[:_SAMPLE_PROMPTS]]
    run = _Run(settings, manifest, store, output, samples)
    try:
        return run.complete()
    finally:
        run.tracker.close()
        # Accelerate keeps its settings for the process; the next training here may want others.
        AcceleratorState._reset_state(reset_partial_state=True)


@dataclasses.dataclass
class _Position:
    """Where training stands; saved with each checkpoint."""

    step: int = 0
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    losses: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


class _Run:
    """Everything a training run holds, built once."""

    def __init__(
        self, settings: Settings, manifest: Manifest, targets: Reader, output: Path, sample_prompts: list[str]
    ) -> None:
        self.settings, self.options, self.output = settings, settings.train, output
        self.sample_prompts = sample_prompts
        self.accelerator = Accelerator(
            cpu=settings.device == "cpu",
            mixed_precision="bf16" if self.options.precision == "bfloat16" else "no",
            gradient_accumulation_steps=self.options.gradient_accumulation_steps,
        )
        _check_world(self.options, self.accelerator.num_processes)
        set_seed(self.options.seed)
        self.tracker = Tracker.open(settings, enabled=self.accelerator.is_main_process)
        self.device = self.accelerator.device
        transformer, self.family = load_transformer(settings.teacher)
        self.stream = StateStream(
            targets, manifest, "train", settings.student_steps, shuffle_mb=settings.train.shuffle_mb
        )
        self.heldout = StateStream(targets, manifest, "heldout", settings.student_steps)
        self.null_P = read_null(targets, manifest).pooled_BP[0].to(self.device)
        self.fusion = _fusion(settings, transformer.time_text_embed, targets, manifest)
        self.heldout_gaps = self._heldout_gaps(transformer)
        self.gap_scale = float(torch.cat(self.heldout_gaps).mean())
        self.position = _Position()
        self._build(fuse(transformer, self.fusion).train().requires_grad_(True))
        self.states = self.stream if self.options.states == "stored" else self._on_policy(targets, manifest)

    def _on_policy(self, targets: Reader, manifest: Manifest) -> OnPolicyStream:
        """The student's own states; the teacher is held beside it, without text encoders."""
        settings = self.settings
        encoders = {name: None for name in ("text_encoder", "text_encoder_2", "text_encoder_3")}
        teacher = load_teacher(settings.teacher, device=str(self.device), **encoders)

        def student(x_BCHW: Tensor, sigma_B: Tensor, s_B: Tensor, text: TextEmbeddings) -> Tensor:
            with self.accelerator.autocast():
                return self._velocity(self.model, x_BCHW, sigma_B, s_B, text)

        return OnPolicyStream(
            self.stream,
            with_weights(teacher, settings.strategy),
            make_strategy(settings.strategy),
            settings.strategy.num_steps,
            read_null(targets, manifest),
            student,
        )

    @torch.no_grad()
    def _heldout_gaps(self, transformer: Any) -> list[Tensor]:
        """Mean squared gap [B] between target and conditional velocity, of each batch of held-out states.

        Stored with the targets; for longer steps, whose velocities are others, from the transformer before it is fused.
        """
        batches = self.heldout.in_order(batch_size=_EVAL_BATCH)
        if self.settings.student_steps == self.settings.strategy.num_steps:
            return [states.gap_B for states in batches]
        gaps = []
        for states in (batch.to(self.device) for batch in batches):
            conditional = self.family.velocity(
                transformer.to(self.device),
                states.x_BCHW,
                states.sigma_B * 1000.0,
                states.text.tokens_BTE.float(),
                states.text.pooled_BP.float(),
            )
            gaps.append((states.velocity_BCHW - conditional).square().mean(dim=(1, 2, 3)).cpu())
        return gaps

    def _build(self, transformer: Any) -> None:
        options = self.options
        optimizer = torch.optim.AdamW(
            transformer.parameters(),
            lr=options.learning_rate,
            betas=(options.adam_beta1, options.adam_beta2),
            weight_decay=options.weight_decay,
        )
        self.model, self.optimizer = self.accelerator.prepare(transformer, optimizer)
        self.schedule = get_scheduler(
            "constant_with_warmup" if options.lr_schedule == "constant" else options.lr_schedule,
            self.optimizer.optimizer,
            num_warmup_steps=options.warmup_steps,
            num_training_steps=options.steps,
        )
        self.ema = EMAModel(transformer.parameters(), decay=options.ema_decay) if options.ema_decay else None
        self.accelerator.register_for_checkpointing(self.schedule, self.position)
        if self.ema:
            self.accelerator.register_for_checkpointing(self.ema)

    def complete(self) -> dict[str, Any]:
        """Train to the last step, export, and return the record."""
        resumed = load_latest(self.accelerator, self.output / "checkpoints")
        self.tracker.log_params({"fusion": self.fusion.model_dump(), **self.settings.content()})
        if resumed == 0:
            self._evaluate()
        else:
            log.info("continuing from step %d", resumed)
        self._loop()
        return self._export(resumed)

    def _loop(self) -> None:
        options, accelerator = self.options, self.accelerator
        batches = self.states.batches(
            batch_size=options.batch_size,
            seed=options.seed,
            start=self.position.step,
            rank=accelerator.process_index,
            ranks=accelerator.num_processes,
        )
        started = time.monotonic() - self.position.seconds
        with self._progress() as progress:
            for states in batches:
                if self.position.step >= options.steps:
                    break
                loss, norm = self._step(states.to(self.device))
                self.position.step += 1
                self.position.seconds = time.monotonic() - started
                self._after_step(loss, norm)
                residual = f"residual {self.position.curve[-1][1]:.3f}" if self.position.curve else ""
                progress.advance(1, note=residual, states=options.batch_size)

    def _step(self, states: States) -> tuple[Tensor, Tensor]:
        """One optimizer step; returns mean loss and gradient norm, still on the device."""
        options, losses = self.options, []
        norm = torch.zeros(())
        for part in _split(states, options.gradient_accumulation_steps):
            with self.accelerator.accumulate(self.model), self._attention():
                predicted = self._predict(self.model, part)
                loss = distillation_loss(
                    predicted, part.velocity_BCHW, part.gap_B, weighting=options.loss_weighting, scale=self.gap_scale
                )
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
                self.optimizer.step()
                self.optimizer.zero_grad()
            losses.append(loss.detach())
        self.schedule.step()
        if self.ema:
            self.ema.step(self.model.parameters())
        return torch.stack(losses).mean(), norm

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        return plain_attention() if self.device.type == "cpu" else contextlib.nullcontext()

    def _predict(self, model: Any, states: States) -> Tensor:
        """The student's velocity [B, C, H, W] at the states, each with its own guidance."""
        return self._velocity(model, states.x_BCHW, states.sigma_B, states.guidance_B, states.text)

    def _velocity(self, model: Any, x_BCHW: Tensor, sigma_B: Tensor, s_B: Tensor, text: TextEmbeddings) -> Tensor:
        packed = pack(text.pooled_BP, self.null_P, s_B)
        return self.family.velocity(model, x_BCHW, sigma_B * 1000.0, text.tokens_BTE.float(), packed)

    def _after_step(self, loss: Tensor, norm: Tensor) -> None:
        options, step = self.options, self.position.step
        last = step == options.steps
        if step % options.log_every == 0 or last:
            self._log_loss(loss, norm)
        if step % options.eval_every == 0 or last:
            self._evaluate()
        if step % options.checkpoint_every == 0 and not last:
            save_checkpoint(self.accelerator, self.output / "checkpoints", step, keep=options.keep_checkpoints)

    def _log_loss(self, loss: Tensor, norm: Tensor) -> None:
        """The one place where the device is waited for."""
        value = float(self.accelerator.reduce(loss, "mean"))
        if not value < float("inf"):  # NaN too
            raise TrainingError(
                f"The loss is {value} at step {self.position.step}. The last checkpoint in {self.output}/checkpoints "
                "is good; lower train.learning_rate (or use train.precision=float32) and run again."
            )
        self.position.losses.append((self.position.step, value))
        rate = self.options.batch_size * self.position.step / max(self.position.seconds, 1e-9)
        self.tracker.log_metrics(
            {
                "train/loss": value,
                "train/grad_norm": float(norm),
                "train/learning_rate": self.schedule.get_last_lr()[0],
                "train/states_per_second": rate,
            },
            step=self.position.step,
        )

    def _evaluate(self) -> None:
        """Guidance residual of the averaged weights on the held-out states."""
        meter = self._residual()
        self.position.curve.append((self.position.step, meter.overall))
        self.tracker.log_metrics({"heldout/guidance_residual": meter.overall}, step=self.position.step)

    @torch.no_grad()
    def _residual(self) -> ResidualMeter:
        strategy = self.settings.strategy
        meter = ResidualMeter(strategy.guidance_min, strategy.guidance_max)
        model = self.accelerator.unwrap_model(self.model)
        with self._averaged_weights():
            model.eval()
            heldout = self.heldout.in_order(batch_size=_EVAL_BATCH)
            for states, gap_B in zip(heldout, self.heldout_gaps, strict=True):
                on_device = states.to(self.device)
                with self.accelerator.autocast():
                    predicted = self._predict(model, on_device)
                meter.add(predicted, on_device.velocity_BCHW, gap_B, on_device.guidance_B)
            model.train()
        return meter

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """The student is its averaged weights; the raw ones come back after the block."""
        if not self.ema:
            yield
            return
        self.ema.store(self.model.parameters())
        self.ema.copy_to(self.model.parameters())
        try:
            yield
        finally:
            self.ema.restore(self.model.parameters())

    def _export(self, resumed: int) -> dict[str, Any]:
        """Save the student and the record; main process only, the others wait."""
        record: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            meter = self._residual()
            record = self._record(meter, resumed)
            transformer = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
            with self._averaged_weights():
                options = self.settings.teacher.model_copy(update={"dtype": "float32"})
                teacher = load_teacher(options, device="cpu", transformer=transformer.eval().to("cpu"))
                student = make_student(
                    teacher.pipeline,
                    self.fusion,
                    max_sequence_length=options.max_sequence_length,
                    guidance_range=(self.settings.strategy.guidance_min, self.settings.strategy.guidance_max),
                    sigmas=_own_sigmas(self.settings, teacher),
                )
                save_student(student, self.output / "student")
                self._log_samples(student)
            write_json(self.output / RESULT, record)
            self.tracker.log_metrics({"guidance_residual": meter.overall}, step=self.position.step)
        self.accelerator.wait_for_everyone()
        return record

    def _record(self, meter: ResidualMeter, resumed: int) -> dict[str, Any]:
        position = self.position
        return {
            "guidance_residual": meter.overall,
            "residual_by_guidance": meter.by_guidance(),
            "residual_curve": position.curve,
            "loss_curve": position.losses,
            "steps": position.step,
            "resumed_from": resumed,
            "seconds": round(position.seconds, 3),
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "ranks": self.accelerator.num_processes,
            "fusion": self.fusion.model_dump(),
        }

    def _log_samples(self, student: Any) -> None:
        """A row of pictures from fixed prompts and seeds, one for each of four guidance scales."""
        from teefusion.pictures import contact_sheet

        low, high = self.settings.strategy.guidance_min, self.settings.strategy.guidance_max
        scales, steps = [low + (high - low) * k / 3 for k in range(4)], self.settings.student_steps
        rows = []
        for prompt in self.sample_prompts:
            generators = [torch.Generator().manual_seed(0) for _ in scales]
            rows.append(
                [
                    student(prompt, guidance_scale=s, num_inference_steps=steps, generator=g).images[0]
                    for s, g in zip(scales, generators, strict=True)
                ]
            )
        if rows:
            self.tracker.log_image(contact_sheet(rows), "samples.png")

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


def _own_sigmas(settings: Settings, teacher: Teacher) -> list[float] | None:
    """Starts of the student's own steps before the schedule's shift; none where it steps as its teacher."""
    if settings.student_steps == settings.strategy.num_steps:
        return None
    shift = teacher.family.shift(teacher.pipeline, teacher.latent_shape)
    sigmas = teacher.grid(settings.strategy.num_steps).sigmas.tolist()
    starts = [sigmas[k] for k in sub_grid(settings.strategy.num_steps, settings.student_steps)[:-1]]
    return [sigma / (shift - (shift - 1) * sigma) for sigma in starts]


def _split(states: States, parts: int) -> Iterator[States]:
    """Micro-batches of equal size."""
    if parts == 1:
        yield states
        return
    for index in torch.arange(len(states)).chunk(parts):
        yield States(
            states.x_BCHW[index],
            states.velocity_BCHW[index],
            states.sigma_B[index],
            states.guidance_B[index],
            states.gap_B[index],
            TextEmbeddings(*(part[index] for part in states.text)),
        )


def main() -> None:
    """Entry of a rank: ``torchrun --nproc-per-node N -m teefusion.training --settings FILE ...``."""
    parser = argparse.ArgumentParser(prog="python -m teefusion.training", description="One rank of the training stage.")
    parser.add_argument("--settings", type=Path, help=f"JSON of the run's settings; none is {JOB_VARIABLE}")
    parser.add_argument("--prompts", type=Path, required=True, help="folder of the prompt set")
    parser.add_argument("--targets", required=True, help="folder or s3:// URI of the target set")
    parser.add_argument("--output", type=Path, required=True, help="folder for checkpoints and the student")
    arguments = parser.parse_args()
    from teefusion.logs import setup_logging

    setup_logging()
    try:
        settings = job_settings(arguments.settings)
        train(settings, prompts=arguments.prompts, targets=arguments.targets, output=arguments.output)
    except TeEFusionError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
