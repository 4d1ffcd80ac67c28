"""Training checkpoints: published whole, verified when loaded, kept to a number.

A checkpoint is what Accelerate saves (weights, optimizer, random states, registered objects), with a digest file
written last. Ranks write into one temporary folder, which the main process renames.
"""

from __future__ import annotations

import logging
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from teefusion.engine import Engine
from teefusion.errors import IntegrityError, StorageError, TrainingError
from teefusion.files import read_json, sha256_file, write_json

log = logging.getLogger(__name__)
_DIGESTS = "digests.json"
_LAYOUT = "layout.json"
_NAME = re.compile(r"step-(\d{8})")


def save_checkpoint(engine: Engine, folder: Path, step: int, *, keep: int) -> None:
    """Publish the state of all ranks as ``folder/step-XXXXXXXX`` and drop all but the newest ``keep``."""
    accelerator = engine.accelerator
    final = folder / f"step-{step:08d}"
    temporary = folder / f".writing-{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    accelerator.wait_for_everyone()
    try:
        engine.save(temporary)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk as their own
        raise StorageError(
            f"Cannot write the checkpoint of step {step} in {folder}: {error}. Free some space and run again: training "
            "continues from the checkpoint before it."
        ) from error
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(temporary / _LAYOUT, engine.layout)
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        write_json(temporary / _DIGESTS, {str(path.relative_to(temporary)): sha256_file(path) for path in files})
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        for old in _steps(folder)[:-keep]:
            shutil.rmtree(folder / f"step-{old:08d}")
    accelerator.wait_for_everyone()


def load_latest(engine: Engine, folder: Path) -> int:
    """Load the newest checkpoint that is whole; return its step, or 0 when there is none.

    A corrupt one is passed over with a warning that names the bad file, and the one before it is used. Raises
    TrainingError for one that these ranks cannot take up.
    """
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step:08d}"
        try:
            _verify(path)
        except IntegrityError as error:
            log.warning("%s Using the checkpoint before it.", error)
            continue
        saved = read_json(path / _LAYOUT)
        if saved != engine.layout:
            raise TrainingError(
                f"The checkpoint {path} is of {_told(saved)}, this run has {_told(engine.layout)}. DeepSpeed's "
                f"checkpoints fit their own layout alone: set it as it was, or delete {folder} to start anew."
            )
        engine.load(path)
        return step
    return 0


def _told(layout: dict[str, int]) -> str:
    return f"ZeRO stage {layout['zero_stage']} on {layout['ranks']} ranks" if layout["zero_stage"] else "no ZeRO"


def _verify(path: Path) -> None:
    for name, digest in read_json(path / _DIGESTS).items():
        if not (path / name).exists() or sha256_file(path / name) != digest:
            raise IntegrityError(f"Checkpoint {path} is corrupt: {name} is not what was saved.")


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that were published whole, ascending."""
    if not folder.exists():
        return []
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir() if (path / _DIGESTS).exists()]
    return sorted(int(match[1]) for match in found if match)
