"""Run the training stage here, or under torchrun when it takes more ranks."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from teefusion.errors import TrainingError
from teefusion.settings import Settings
from teefusion.storage import read_json, write_bytes


def run_training(settings: Settings, *, prompts: Path, targets: Path, output: Path) -> dict[str, Any]:
    """Train and return the record; with one process in this one, else under ``torchrun --standalone``.

    Raises what ``training.train`` raises; from torchrun, TrainingError naming the exit code.
    """
    if settings.train.num_processes == 1:
        from teefusion.training import train

        return train(settings, prompts=prompts, targets=targets, output=output)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        write_bytes(file, settings.to_json().encode())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={settings.train.num_processes}", "-m", "teefusion.training"]
        command += [f"--settings={file}", f"--prompts={prompts}", f"--targets={targets}", f"--output={output}"]
        code = subprocess.run(command, check=False, stdout=sys.stderr).returncode
    if code:
        raise TrainingError(f"Training under torchrun ended with exit code {code}; the reason is above.")
    record: dict[str, Any] = read_json(output / "training.json")
    return record
