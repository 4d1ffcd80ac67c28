"""Objects of a remote store on local disk, so that every epoch after the first reads them here.

The folder is bounded: what was read longest ago makes room. Ranks of one machine share it. A copy is only a copy: its
reader verifies it as it would the original, and one that is damaged is dropped and fetched again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from pathlib import Path

from teefusion.errors import StorageError
from teefusion.files import content_key, read_large, write_bytes
from teefusion.settings import Settings
from teefusion.storage import Reader, is_remote, open_store
from teefusion.workspace import Workspace

log = logging.getLogger(__name__)
_LONGEST_WRITE_S = 3600.0  # a hidden file older than this is no write under way, but what a kill left of one


def open_shards(settings: Settings, uri: str) -> Reader:
    """A target set, for reading: through the cache where it is remote."""
    store = open_store(uri, settings.storage)
    if not is_remote(uri):
        return store
    return CachedReader(store, Workspace(settings).cache, int(settings.storage.cache_gb * 2**30))


class CachedReader:
    """A reader whose large reads leave a copy in ``folder``, which holds at most ``limit_bytes``."""

    def __init__(self, store: Reader, folder: Path, limit_bytes: int) -> None:
        self._store, self._folder, self._limit = store, folder, limit_bytes
        self._own = folder / content_key(store.uri)
        self._writing = threading.Lock()
        self._full = False  # said once
        self.uri = store.uri

    def read(self, name: str) -> bytes:
        """See ``Reader``. Not from a copy: manifests are small, and written anew where a set is repaired."""
        return self._store.read(name)

    def read_large(self, name: str) -> memoryview:
        """See ``Reader``."""
        path = self._own / name
        with contextlib.suppress(OSError):
            data = read_large(path)
            os.utime(path)  # the last to make room
            return data
        data = self._store.read_large(name)
        if len(data) <= self._limit:
            self._keep(path, data)
        return data

    def forget(self, name: str) -> bool:
        """See ``Reader``."""
        try:
            (self._own / name).unlink()
        except FileNotFoundError:
            return False
        return True

    def where(self, name: str) -> str:
        """See ``Reader``."""
        return self._store.where(name)

    def _keep(self, path: Path, data: memoryview) -> None:
        """A copy, where the disk takes one: without it the object is read from the store again."""
        try:
            with self._writing:
                self._make_room(len(data))
                write_bytes(path, data)
        except StorageError as error:
            if not self._full:
                log.warning(
                    "%s Going on without the cache; storage.cache_gb says how much of the disk it takes.", error
                )
            self._full = True

    def _make_room(self, wanted: int) -> None:
        """Remove what was read longest ago. Another rank may do so at the same time: then less is kept."""
        files = []
        for path in self._folder.rglob("*"):
            with contextlib.suppress(OSError):
                status = path.stat()
                writing = path.name.startswith(".") and time.time() - status.st_mtime < _LONGEST_WRITE_S
                if path.is_file() and not writing:
                    files.append((status.st_mtime, status.st_size, path))
        total = sum(size for _, size, _ in files) + wanted
        for _, size, path in sorted(files):
            if total <= self._limit:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
