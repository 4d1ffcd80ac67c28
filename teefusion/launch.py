"""Run a stage's work here, or under torchrun where it takes more processes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from teefusion.errors import TeEFusionError, TrainingError
from teefusion.files import read_json, write_bytes
from teefusion.settings import Settings


def run_training(settings: Settings, *, prompts: Path, targets: str, output: Path) -> dict[str, Any]:
    """Train and return the record; with one process in this one, else, and for ZeRO, under ``torchrun --standalone``.

    Raises what ``training.train`` raises; from torchrun, TrainingError naming the exit code.
    """
    if settings.train.num_processes == 1 and settings.train.zero_stage == 0:
        from teefusion.training import train

        return train(settings, prompts=prompts, targets=targets, output=output)
    arguments = [f"--prompts={prompts}", f"--targets={targets}", f"--output={output}"]
    restarts = settings.train.max_restarts
    code = _torchrun(settings, settings.train.num_processes, "teefusion.training", arguments, restarts=restarts)
    if code:
        raise TrainingError(f"Training under torchrun ended with exit code {code}; the reason is above.")
    record: dict[str, Any] = read_json(output / "training.json")
    return record


def run_targets(settings: Settings, *, prompts: Path, output: str) -> None:
    """Make a target set; with one worker in this process, else under ``torchrun --standalone``.

    Raises what ``target_sets.generate_tracked`` raises; from torchrun, TeEFusionError naming the exit code.
    """
    if settings.targets.num_processes == 1:
        from teefusion.prompts import load_prompt_set
        from teefusion.storage import open_store
        from teefusion.target_sets import generate_tracked

        generate_tracked(settings, load_prompt_set(prompts), open_store(output, settings.storage))
        return
    arguments = [f"--prompts={prompts}", f"--output={output}"]
    code = _torchrun(settings, settings.targets.num_processes, "teefusion.target_sets", arguments)
    if code:
        raise TeEFusionError(
            f"Making targets under torchrun ended with exit code {code}; the reason is above. Finished shards are kept."
        )


def run_scoring(settings: Settings, *, prompts: Path, student: Path, output: Path) -> None:
    """Have several processes score an evaluation's pictures; with one there is nothing to do before the stage itself.

    Raises TeEFusionError naming torchrun's exit code.
    """
    if settings.evaluate.num_processes == 1:
        return
    arguments = [f"--prompts={prompts}", f"--student={student}", f"--output={output}"]
    code = _torchrun(settings, settings.evaluate.num_processes, "teefusion.comparison", arguments)
    if code:
        raise TeEFusionError(
            f"Scoring under torchrun ended with exit code {code}; the reason is above. Scored batches are kept."
        )


def _torchrun(settings: Settings, processes: int, module: str, arguments: list[str], *, restarts: int = 0) -> int:
    """The exit code. All ranks start again when one dies, ``restarts`` times at most.

    What they print goes to standard error: standard output is the command's result.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        write_bytes(file, settings.to_json().encode())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}", "-m", module, f"--settings={file}", *arguments]
        return subprocess.run(command, check=False, stdout=sys.stderr).returncode
