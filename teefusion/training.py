"""Training's entry: a fused copy of the teacher regresses the teacher's effective velocity.

Runs alike in one process and under ``torchrun -m teefusion.training``; Accelerate drives both. Only the student is
in the engine: targets were computed before, so no teacher is held while training.
"""

from __future__ import annotations

import argparse
import contextlib
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

from teefusion.cache import open_shards
from teefusion.devices import resolve_device
from teefusion.errors import TeEFusionError
from teefusion.files import write_json
from teefusion.manifests import read_manifest
from teefusion.memory import return_freed_memory
from teefusion.prompts import load_prompt_set
from teefusion.sample_sheets import SampleSheet
from teefusion.settings import JOB_VARIABLE, Settings, job_settings
from teefusion.training_memory import describe_trial, rehearse
from teefusion.training_run import Run

log = logging.getLogger("teefusion.training")  # under torchrun this module is __main__
DRY_RUN = "dry-run.json"
_TRIED_STEPS = 2


def train(settings: Settings, *, prompts: Path, targets: str, output: Path) -> dict[str, Any]:
    """Train, save the student to ``output/student`` and the record to ``output/training.json``, written last.

    Continues from the newest checkpoint in ``output/checkpoints``. Raises IntegrityError for bad targets,
    TrainingError for losses that stay non-finite, InterruptedRunError after SIGTERM, TrackingError when MLflow cannot
    be reached at the start.
    """
    store = open_shards(settings, targets)
    manifest = read_manifest(store, teacher_revision=settings.teacher.revision)
    texts = [prompt.text for prompt in load_prompt_set(prompts).heldout]
    with _accelerate_ends_with_it():
        run = Run(settings, manifest, store, output)
        try:
            sheet = SampleSheet(settings, manifest, store, shown=run.accelerator.is_main_process)
            run.tracker.log_params({"samples": {str(row): text for row, text in enumerate(texts[: len(sheet)], 1)}})
            with _stopped_by_sigterm(run):
                return run.complete(sheet)
        finally:
            run.tracker.close()


def dry_run(settings: Settings, *, prompts: Path, targets: str, output: Path) -> dict[str, Any]:
    """Build everything, take a few steps, and return what they took; every rank has to. Leaves ``DRY_RUN`` in output.

    Writes no checkpoint, no student and nothing to MLflow. Raises as ``train``.
    """
    store = open_shards(settings, targets)
    manifest = read_manifest(store, teacher_revision=settings.teacher.revision)
    if resolve_device(settings.device) == "cpu":
        return_freed_memory()  # first, as what malloc once kept it fills again, whatever its threshold is by then
        rehearse(settings)
        return_freed_memory()  # what stays is the process's, and Run measures from here
    with _accelerate_ends_with_it():
        run = Run(settings, manifest, store, output, tracked=False)
        record = _try_out(run)
        if run.accelerator.is_main_process:
            write_json(output / DRY_RUN, record)
        return record


@contextlib.contextmanager
def _accelerate_ends_with_it() -> Iterator[None]:
    """Accelerate keeps its settings for the process; the next training here may want others."""
    try:
        yield
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def _try_out(run: Run) -> dict[str, Any]:
    """Take a few steps and say what they took. The first is left out: it is there to make and compile things."""
    batches, seconds = run.batches(), []
    for _ in range(1 + _TRIED_STEPS):
        run.memory.reset()
        started = time.monotonic()
        run.step(next(batches).to(run.device))
        if run.device.type == "cuda":
            torch.cuda.synchronize(run.device)
        seconds.append(time.monotonic() - started)
    peak = run.accelerator.reduce(torch.tensor(float(run.memory.peak()), device=run.device), "max")
    cpu, step_seconds = run.device.type == "cpu", statistics.median(seconds[1:])
    return describe_trial(run.settings, cpu=cpu, measured_bytes=int(peak), step_seconds=step_seconds)


@contextlib.contextmanager
def _stopped_by_sigterm(run: Run) -> Iterator[None]:
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
