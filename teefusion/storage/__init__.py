"""Objects under a URI, in a folder or in S3: each is whole or absent, whoever writes it.

    store = open_store("s3://bucket/targets/KEY", settings.storage)
    store.write("states/train-00000.safetensors", data)

A folder publishes by rename (``teefusion.files``), S3 by the PUT or the completed multipart upload itself. Transfers
are boto3's: it retries a request that fails and a body that breaks off, and checks its own checksums. What a reader
trusts it compares with a sha256 of ours nevertheless (``teefusion.shards``).
"""

from __future__ import annotations

from typing import Protocol

from teefusion.settings import StorageSettings
from teefusion.storage.folder import FolderStore
from teefusion.storage.s3 import S3Credentials, S3Store
from teefusion.storage.uris import is_remote, join, local_path

__all__ = [
    "FolderStore",
    "Reader",
    "S3Credentials",
    "S3Store",
    "Store",
    "is_remote",
    "join",
    "local_path",
    "open_store",
]


class Reader(Protocol):
    """Objects by name, in one folder or under one prefix."""

    uri: str

    def read(self, name: str) -> bytes:
        """The object. Raises NotFoundError where there is none, StorageError where it cannot be had."""
        ...

    def read_large(self, name: str) -> memoryview:
        """The object, as ``read`` gives it, in memory that is fast to fill with megabytes."""
        ...

    def forget(self, name: str) -> bool:
        """Drop a copy held nearer than the object itself; whether there was one, so that reading again may help."""
        ...

    def where(self, name: str) -> str:
        """The object's path or URI, for messages."""
        ...


class Store(Reader, Protocol):
    """Objects that can be written, too."""

    def write(self, name: str, data: bytes) -> None:
        """Publish the object whole, in place of any older one. Raises StorageError."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Publish the object if there is none of that name; whether this call did. Raises StorageError."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of the object, none where there is none. Raises StorageError."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object whose name begins with ``prefix``, sorted by name. Raises StorageError."""
        ...

    def delete(self, name: str) -> None:
        """Remove the object, if it is there. Raises StorageError."""
        ...


def open_store(uri: str, settings: StorageSettings | None = None) -> Store:
    """The store at a folder, a ``file://`` or an ``s3://bucket/prefix`` URI. Raises SettingsError for any other."""
    if is_remote(uri):
        return S3Store(uri, settings or StorageSettings())
    return FolderStore(local_path(uri))
