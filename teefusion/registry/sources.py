"""A student folder behind a version's source: stored once, fetched once, verified whenever it is used."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from teefusion.errors import RegistryError
from teefusion.files import storage_error
from teefusion.registry.packaging import digest_of
from teefusion.settings import Settings
from teefusion.storage import S3Store, is_remote, local_path
from teefusion.tracking import mlflow_errors, tracking_uri
from teefusion.workspace import Workspace

log = logging.getLogger(__name__)


def digest_at(settings: Settings, source: str) -> str:
    """The digest of what lies at a source now. Raises RegistryError, StorageError, TrackingError."""
    if (folder := _local(source)) is not None:
        return digest_of(_require_folder(folder))
    with _fetched(settings, source) as copy:
        return digest_of(copy)


def fetch_verified(settings: Settings, source: str, digest: str, *, what: str) -> Path:
    """A local folder with this digest, computed now: the source itself, or a copy in ``<workdir>/models``.

    Raises RegistryError where the digest is another, StorageError, TrackingError.
    """
    if (folder := _local(source)) is not None:
        _require_digest(digest_of(_require_folder(folder)), digest, source, what)
        return folder
    kept = Workspace(settings).models / digest
    if kept.is_dir():
        if digest_of(kept) == digest:
            return kept
        log.warning("The copy of %s in %s is damaged; fetching it again.", what, kept)
        shutil.rmtree(kept, ignore_errors=True)
    with _fetched(settings, source) as copy:
        _require_digest(digest_of(copy), digest, source, what)
        try:
            copy.rename(kept)
        except OSError as error:
            if not kept.is_dir():  # else somebody was faster
                raise storage_error(error, kept, "write") from error
    return kept


def _require_folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise RegistryError(
            f"The student folder {folder} is not there. It was registered from another machine or has been removed: "
            "put it back, or register the student with storage.uri set, so that it lies in S3."
        )
    return folder


def _require_digest(found: str, expected: str, source: str, what: str) -> None:
    if found != expected:
        raise RegistryError(
            f"{what} is not what was registered: the files at {source} have digest {found[:16]}, the version says "
            f"{expected[:16]}. Nothing was loaded. Restore the files, register the student again, or move the alias "
            "back: 'teefusion rollback NAME'."
        )


def _local(source: str) -> Path | None:
    """The folder of this machine that a source names; none for S3, and for the schemes that MLflow knows."""
    return local_path(source) if urlsplit(source).scheme in ("", "file") else None


@contextlib.contextmanager
def _fetched(settings: Settings, source: str) -> Iterator[Path]:
    """A copy of what lies at a source, for the block alone unless it is moved away."""
    models = Workspace(settings).models
    try:
        models.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.TemporaryDirectory(prefix=".arriving-", dir=models)
    except OSError as error:
        raise storage_error(error, models, "write") from error
    with temporary:
        copy = Path(temporary.name) / "student"
        copy.mkdir()
        if is_remote(source):
            _download(settings, source, copy)
            yield copy
        else:
            yield _download_by_mlflow(settings, source, copy)


def _download(settings: Settings, source: str, folder: Path) -> None:
    store = S3Store(source, settings.storage)
    names = [PurePosixPath(name) for name in store.sizes()]
    if not names:
        raise RegistryError(f"There is nothing at {source}: was it deleted? Register the student again.")
    for name in names:
        if name.is_absolute() or ".." in name.parts:
            raise RegistryError(f"{source} holds {name}, which no student does. Nothing was loaded.")
        if not name.name.startswith("."):
            store.download(str(name), folder / name)


def _download_by_mlflow(settings: Settings, source: str, folder: Path) -> Path:
    """The folder that the files are in; MLflow may make one below."""
    from mlflow.artifacts import download_artifacts

    with mlflow_errors(settings, f"fetch {source}", missing=f"there is nothing at {source}"):
        return Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=tracking_uri(settings)))
