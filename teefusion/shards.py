"""The format of stored targets: safetensors shards, prompt embeddings stored once a prompt, one manifest.

    <folder>/manifest.json                         written last; a folder without one is not a target set
    <folder>/states/{train,heldout}-00000.safetensors      rows of states
    <folder>/embeddings/{train,heldout}-00000.safetensors  tokens and pooled text of a block of prompts
    <folder>/embeddings/null.safetensors                   the empty prompt's

A row is one state of one trajectory: ``x`` and ``velocity`` [C, H, W], ``sigma``, ``step``, ``guidance`` (s),
``guidance_gap`` (mean squared difference of the target and the conditional velocity), ``trajectory`` and ``prompt``
(its index in the split's prompts). Beside each file lies its record (rows, bytes, sha256), written after it: a file
without a fitting record is not trusted.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from teefusion.errors import IntegrityError
from teefusion.manifests import FileRecord
from teefusion.storage import read_json, sha256_file, storage_error, write_bytes, write_json


def write_tensors(folder: Path, name: str, tensors: dict[str, Tensor], *, forwards: int = 0) -> FileRecord:
    """Publish a file and then its record. Raises StorageError."""
    path = folder / f"{name}.safetensors"
    data = save_tensors({key: value.contiguous() for key, value in tensors.items()})
    write_bytes(path, data)
    rows = len(next(iter(tensors.values())))
    record = FileRecord(name=name, rows=rows, bytes=len(data), sha256=sha256_file(path), forwards=forwards)
    write_json(_record_path(folder, name), record.model_dump())
    return record


def finished(folder: Path, name: str) -> FileRecord | None:
    """The record of a file that an earlier run published whole, or none: then write it again."""
    path = _record_path(folder, name)
    if not path.exists():
        return None
    try:
        record = FileRecord.model_validate(read_json(path))
        check_file(folder, record)
    except (IntegrityError, ValidationError):
        return None
    return record


def check_file(folder: Path, record: FileRecord) -> bytes:
    """The file's bytes, once size and sha256 are what the record says. Raises IntegrityError otherwise."""
    path = folder / f"{record.name}.safetensors"
    advice = f"Run the targets stage again: it makes the bad files anew ('rm {path}' first if this repeats)."
    if not path.exists():
        raise IntegrityError(f"{path} is missing. {advice}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise storage_error(error, path, "read") from error
    if len(data) != record.bytes:
        raise IntegrityError(f"{path} has {len(data)} bytes, the manifest says {record.bytes}. {advice}")
    digest = sha256_file(path)
    if digest != record.sha256:
        raise IntegrityError(
            f"{path} is corrupt: sha256 {digest[:12]}, the manifest says {record.sha256[:12]}. {advice}"
        )
    return data


def read_tensors(folder: Path, record: FileRecord) -> dict[str, Tensor]:
    """A file's tensors, verified first. Raises IntegrityError."""
    return load_tensors(check_file(folder, record))


def _record_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"
