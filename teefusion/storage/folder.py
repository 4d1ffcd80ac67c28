"""A folder as a store."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from teefusion.errors import NotFoundError
from teefusion.files import create_bytes, read_large, storage_error, write_bytes


class FolderStore:
    """A folder. Another process or machine may write there too, on any file system with atomic rename and link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = str(folder)

    def read(self, name: str) -> bytes:
        """See ``Store``."""
        with self._read_errors(name):
            return (self.folder / name).read_bytes()

    def read_large(self, name: str) -> memoryview:
        """See ``Store``."""
        with self._read_errors(name):
            return read_large(self.folder / name)

    def write(self, name: str, data: bytes) -> None:
        """See ``Store``."""
        write_bytes(self.folder / name, data)

    def create(self, name: str, data: bytes) -> bool:
        """See ``Store``."""
        return create_bytes(self.folder / name, data)

    def size(self, name: str) -> int | None:
        """See ``Store``."""
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error, self.folder / name, "read") from error

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See ``Store``; hidden files, which are writes under way, are left out."""
        sizes = {}
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if name.startswith(prefix) and not path.name.startswith(".") and path.is_file():
                with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                    sizes[name] = path.stat().st_size
        return sizes

    def delete(self, name: str) -> None:
        """See ``Store``."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.folder / name, "delete") from error

    def forget(self, name: str) -> bool:
        """See ``Reader``; nothing is nearer."""
        return False

    def where(self, name: str) -> str:
        """See ``Reader``."""
        return str(self.folder / name)

    @contextlib.contextmanager
    def _read_errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise NotFoundError(f"{self.where(name)} is missing.") from error
        except OSError as error:
            raise storage_error(error, self.folder / name, "read") from error
