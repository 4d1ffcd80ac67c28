"""Files that are either whole or absent: atomic publishing, checksums, canonical JSON.

Everything a later run trusts is written under a temporary name in the target's own folder, flushed to disk, and
renamed into place; rename is atomic on POSIX file systems, so a reader sees the old state or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from teefusion.errors import IntegrityError, StorageError

_CHUNK_BYTES = 1 << 20
_NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def canonical_json(value: Any) -> str:
    """One spelling for one value: sorted keys, no spaces, so that equal content has equal bytes and hashes.

    Raises ValueError for NaN and infinities, which JSON cannot carry.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_key(value: Any, *, length: int = 16) -> str:
    """Name of a thing by what determines it: the first ``length`` hex digits of sha256(canonical JSON)."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]


def plain_name(text: str) -> str:
    """``text`` as a part of a path or of a key of MLflow's; where that changes it, its digest keeps it apart."""
    plain = re.sub(r"[^\w.\- ]", "_", text)
    return plain if plain == text and not text.startswith(".") else f"{plain}-{content_key(text, length=8)}"


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file, read in chunks. Raises StorageError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise storage_error(error, path, "read") from error
    return digest.hexdigest()


def sha256_folder(folder: Path, *, besides: Collection[str] = ()) -> str:
    """Hex sha256 over the relative names and contents of all files below ``folder``.

    Hidden files are left out, and ``besides``, by their relative names.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    names = [name for p in files if (name := p.relative_to(folder).as_posix()) not in besides]
    return hashlib.sha256(canonical_json([[name, sha256_file(folder / name)] for name in names]).encode()).hexdigest()


def storage_error(error: OSError, path: Path, action: str) -> StorageError:
    """Translate an operating-system error into what went wrong, where, and what to do."""
    if error.errno in _NO_SPACE:
        advice = "Free some space (or choose another --workdir) and run again: finished parts are kept."
        return StorageError(f"Cannot {action} {path}: no space left ({error.strerror}). {advice}")
    if isinstance(error, PermissionError):
        return StorageError(f"Cannot {action} {path}: permission denied. Check the owner and mode of its folder.")
    return StorageError(f"Cannot {action} {path}: {error.strerror or error}.")


def write_bytes(path: Path, data: bytes | memoryview) -> None:
    """Publish ``data`` at ``path`` whole or not at all. Raises StorageError."""
    with _written_beside(path, data) as temporary:
        os.replace(temporary, path)


def create_bytes(path: Path, data: bytes) -> bool:
    """Publish ``data`` at ``path`` if there is nothing there; whether this call did. Raises StorageError."""
    with _written_beside(path, data) as temporary:
        try:
            os.link(temporary, path)  # which a file system makes only where there is nothing
        except FileExistsError:
            return False
    return True


@contextlib.contextmanager
def _written_beside(path: Path, data: bytes | memoryview) -> Iterator[str]:
    """A temporary file in the same folder, on disk with all of the data; gone after the block, if it is still there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files only their owner can read; results are for the team
            yield temporary
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
    except OSError as error:
        raise storage_error(error, path, "write") from error


def json_bytes(value: Any) -> bytes:
    """Indented JSON with sorted keys. Raises ValueError for NaN."""
    return (json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Publish ``value`` as indented JSON with sorted keys. Raises StorageError, and ValueError for NaN."""
    write_bytes(path, json_bytes(value))


def read_large(path: Path) -> memoryview:
    """A file of megabytes, in memory on huge pages where the system has them: numpy asks for them, ``bytes`` does not.

    A page at a time, the kernel takes longer to hand out fresh memory than to fill it from its cache
    (docs/results/storage.md). Raises OSError.
    """
    import numpy as np

    with path.open("rb", buffering=0) as stream:
        buffer = np.empty(os.fstat(stream.fileno()).st_size, np.uint8).data
        filled = 0
        while filled < len(buffer) and (count := stream.readinto(buffer[filled:])):
            filled += count
    return buffer[:filled]


def read_json(path: Path) -> Any:
    """Read a JSON file that this program wrote. Raises StorageError if unreadable, IntegrityError if not JSON."""
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise storage_error(error, path, "read") from error
    except ValueError as error:
        raise IntegrityError(f"{path} is not valid JSON ({error}). Delete it and run the stage again.") from error


@contextlib.contextmanager
def publish_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes ``path`` when the block ends well, and vanishes when it does not.

    An existing folder at ``path`` is replaced. Raises StorageError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise storage_error(error, path, "write") from error
    try:
        os.chmod(temporary, 0o755)
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.rename(temporary, path)
    except OSError as error:
        if error.errno in _NO_SPACE:  # other errors of the block are its own, and speak for themselves
            raise storage_error(error, path, "write") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def readable_bytes(count: int) -> str:
    """For people, in units of 1000 as disks and data sheets count."""
    power = min(max(len(str(count)) - 1, 0) // 3, 5)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[power]}"
