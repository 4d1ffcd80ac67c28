"""A student folder behind a version's source: stored once, fetched once, verified whenever it is used."""

from __future__ import annotations

import logging
import os
from pathlib import Path, PurePosixPath

from teefusion.errors import RegistryError, SettingsError
from teefusion.files import publish_folder, sha256_folder
from teefusion.settings import Settings
from teefusion.storage import is_remote, local_path, open_store
from teefusion.tracking import mlflow_errors, tracking_uri
from teefusion.workspace import Workspace

log = logging.getLogger(__name__)


def fetch(settings: Settings, source: str) -> Path:
    """A local folder with what lies at ``source`` now: the folder itself, or a new copy below ``<workdir>/models``.

    Raises StorageError, TrackingError where it cannot be had.
    """
    if (folder := _local(source)) is not None:
        if not folder.is_dir():
            raise RegistryError(
                f"The student folder {folder} is not there. It was registered from another machine or has been "
                "removed: put it back, or register the student with storage.uri set, so that it lies in S3."
            )
        return folder
    arriving = Workspace(settings).models / f"arriving-{os.getpid()}"
    with publish_folder(arriving) as temporary:
        _download(settings, source, temporary)
    folder = arriving.with_name(sha256_folder(arriving))
    if folder.exists():  # somebody else was faster
        _remove(arriving)
    else:
        arriving.rename(folder)
    return folder


def fetch_verified(settings: Settings, source: str, digest: str, *, what: str) -> Path:
    """A local folder whose digest is ``digest``, verified now. Raises RegistryError where it is another."""
    if _local(source) is None:
        kept = Workspace(settings).models / digest
        if kept.is_dir():
            if sha256_folder(kept) == digest:
                return kept
            log.warning("The copy of %s in %s is damaged; fetching it again.", what, kept)
            _remove(kept)
    folder = fetch(settings, source)
    found = sha256_folder(folder)
    if found != digest:
        if _local(source) is None:
            _remove(folder)
        raise RegistryError(
            f"{what} is not what was registered: the files at {source} have digest {found[:16]}, the version says "
            f"{digest[:16]}. Nothing was loaded. Restore the files, register the student again, or move the alias "
            "back: 'teefusion rollback NAME'."
        )
    return folder


def _local(source: str) -> Path | None:
    try:
        return None if is_remote(source) else local_path(source)
    except SettingsError:  # another scheme, which MLflow may know
        return None


def _download(settings: Settings, source: str, folder: Path) -> None:
    if is_remote(source):
        store = open_store(source, settings.storage)
        names = [name for name in store.names() if not PurePosixPath(name).name.startswith(".")]
        if not names:
            raise RegistryError(f"There is nothing at {source}: was it deleted? Register the student again.")
        for name in names:
            store.download(name, folder / name)
        return
    from mlflow.artifacts import download_artifacts

    with mlflow_errors(settings, f"fetch {source}", missing=f"there is nothing at {source}"):
        found = Path(download_artifacts(artifact_uri=source, dst_path=str(folder), tracking_uri=tracking_uri(settings)))
    if found != folder:  # it comes below a folder of its own
        for item in found.iterdir():
            item.rename(folder / item.name)
        found.rmdir()


def _remove(folder: Path) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
