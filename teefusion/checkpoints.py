"""Training checkpoints: published whole, verified when loaded, kept to a number.

A checkpoint is a folder of safetensors files (float32 weights, optimizer states and averages, by name), ``state.json``
(counters, and where the run stands), and a file of digests, written last. It says nothing of ranks or of ZeRO: any
number of them, at any stage, can go on from it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from teefusion.engine import Engine
from teefusion.errors import IntegrityError, StorageError
from teefusion.files import read_json, sha256_file, write_bytes, write_json

log = logging.getLogger(__name__)
_DIGESTS, _STATE = "digests.json", "state.json"
_NAME, _WRITING = re.compile(r"step-(\d{8})"), ".writing-"
_FILE_BYTES = 1 << 30  # what the main process gathers in memory before it writes


def save_checkpoint(engine: Engine, folder: Path, step: int, *, position: dict[str, Any], keep: int) -> None:
    """Publish training's state as ``folder/step-XXXXXXXX``, and drop all but the newest ``keep``.

    Every rank takes part, the main process writes. ``position`` is what ``load_latest`` returns. Raises StorageError.
    """
    if engine.accelerator.is_main_process:
        try:
            _publish(engine, folder, step, position)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors report a full disk as theirs
            raise StorageError(
                f"Cannot write the checkpoint of step {step} in {folder}: {error}. Free some space and run again: "
                "training continues from the checkpoint before it."
            ) from error
        _drop_all_but(folder, [number for number in _steps(folder) if number <= step][-keep:])
    else:
        for _ in engine.tensors():
            pass
    engine.accelerator.wait_for_everyone()


def load_latest(engine: Engine, folder: Path) -> dict[str, Any] | None:
    """Load the newest checkpoint that is whole; return its position, or none when there is none.

    A corrupt one is passed over with a warning that names the bad file, and the one before it is used.
    """
    steps = _steps(folder)
    for step in reversed(steps):
        path = folder / f"step-{step:08d}"
        try:
            _verify(path)
        except IntegrityError as error:
            first = step == steps[0]
            resort = "There is none before it: training begins anew." if first else "Using the one before it."
            log.warning("%s %s", error, resort)
            continue
        state = read_json(path / _STATE)
        with _reader(path) as tensor:
            engine.restore(tensor, state["counters"])
        position: dict[str, Any] = state["position"]
        return position
    return None


def _drop_all_but(folder: Path, steps: Sequence[int]) -> None:
    """Of older ones, of later ones, which were corrupt, and of what a kill left of writing or of removing one."""
    kept = {f"step-{number:08d}" for number in steps}
    for path in folder.iterdir():
        if path.name not in kept and (_NAME.fullmatch(path.name) or path.name.startswith(_WRITING)):
            try:
                shutil.rmtree(path)
            except OSError as error:  # this one costs room, no more
                log.warning("Cannot remove the old checkpoint %s: %s", path, error)


def _publish(engine: Engine, folder: Path, step: int, position: dict[str, Any]) -> None:
    final, temporary = folder / f"step-{step:08d}", folder / f"{_WRITING}{step:08d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for number, tensors in enumerate(_files(engine.tensors())):
        save_file(tensors, temporary / f"tensors-{number:05d}.safetensors")
    state = {"counters": engine.counters(), "position": position}
    write_bytes(temporary / _STATE, json.dumps(state).encode())  # a residual in there may be NaN
    written = sorted(path for path in temporary.iterdir())
    write_json(temporary / _DIGESTS, {path.name: sha256_file(path) for path in written})
    shutil.rmtree(final, ignore_errors=True)
    temporary.rename(final)


def _files(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Copies on the CPU, a file's worth at a time."""
    gathered: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        gathered[name] = tensor.to("cpu", copy=True).contiguous()
        size += tensor.nbytes
        if size >= _FILE_BYTES:
            yield gathered
            gathered, size = {}, 0
    if gathered:
        yield gathered


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """A function that reads a tensor by its name."""
    with contextlib.ExitStack() as opened:
        files = [opened.enter_context(safe_open(file, framework="pt")) for file in path.glob("*.safetensors")]
        file_of = {name: file for file in files for name in file.keys()}  # noqa: SIM118  # a method, and no mapping
        yield lambda name: file_of[name].get_tensor(name)


def _verify(path: Path) -> None:
    digests = read_json(path / _DIGESTS)
    for name, digest in digests.items():
        if not (path / name).exists() or sha256_file(path / name) != digest:
            raise IntegrityError(f"Checkpoint {path} is corrupt: {name} is not what was saved.")
    if _STATE not in digests:
        raise IntegrityError(f"Checkpoint {path} is of another version of this program: it has no {_STATE}.")


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that were published whole, ascending."""
    if not folder.exists():
        return []
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir() if (path / _DIGESTS).exists()]
    return sorted(int(match[1]) for match in found if match)
