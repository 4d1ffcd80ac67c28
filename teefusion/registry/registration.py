"""Registration: a version that points at a student folder, stored once, with the tags of where it came from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teefusion.registry.packaging import MLMODEL, add_mlflow_files, digest_of
from teefusion.registry.store import ensure_models
from teefusion.registry.versions import CHALLENGER, DIGEST_TAG
from teefusion.settings import Settings
from teefusion.storage import S3Store, is_remote, join
from teefusion.tracking import Tracker, connect, mlflow_errors, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

_KEY_TAG = "run_key"


def register(
    settings: Settings, student: Path, tags: dict[str, Any], description: str, libraries: Mapping[str, str]
) -> tuple[dict[str, Any], bool]:
    """Make a version of this student, or find the one that is there, and give it the alias ``challenger``.

    Adds to the folder what makes it an MLflow model, which requires ``libraries``, versions by name. Returns name,
    version, aliases and source, and whether the version was there already. Only a student whose gate passed may come
    here. Raises TrackingError, StorageError.
    """
    client, name = connect(settings), settings.model_name
    add_mlflow_files(student, libraries)
    digest = digest_of(student)
    with mlflow_errors(settings, f"register {name}"):
        version = _find(client, name, digest, settings.run_key)
        reused = version is not None
        if version is None:
            ensure_models(client, name)
            version = client.create_model_version(
                name,
                source=_source(settings, client, student, digest),
                run_id=Tracker.open(settings).run_id,
                tags={key: str(value) for key, value in tags.items()}
                | {DIGEST_TAG: digest, _KEY_TAG: settings.run_key},
                description=description,
            )
        if CHALLENGER not in version.aliases:
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        found = client.get_model_version(name, version.version)
    details = {
        "name": name,
        "version": int(found.version),
        "aliases": sorted(found.aliases),
        "source": found.source,
        "student_digest": digest,
    }
    return details, reused


def _find(client: MlflowClient, name: str, digest: str, run_key: str) -> Any:
    """The version of these very bytes and this run, so that a rerun registers nothing twice."""
    for version in client.search_model_versions(f"name = '{name}'"):
        if version.tags.get(DIGEST_TAG) == digest and version.tags.get(_KEY_TAG) == run_key:
            return client.get_model_version(name, version.version)  # the search leaves aliases out
    return None


def _source(settings: Settings, client: MlflowClient, student: Path, digest: str) -> str:
    """Where the folder is stored for all who load it.

    In S3 below ``storage.uri`` where that is set; else the folder itself where the registry is local, and the run's
    artifacts where it is a server, which cannot see our disk.
    """
    if settings.storage.uri and is_remote(settings.storage.uri):
        return _store(settings, student, join(settings.storage.uri, "models", digest))
    if not tracking_uri(settings).startswith(("http://", "https://")):
        return str(student)
    run_id = Tracker.open(settings).run_id
    client.log_artifacts(run_id, str(student), "student")
    return f"{client.get_run(run_id).info.artifact_uri}/student"


def _store(settings: Settings, student: Path, uri: str) -> str:
    """Upload the folder, ``MLmodel`` last, unless that is there: then all of it is."""
    store = S3Store(uri, settings.storage)
    if store.size(MLMODEL) is None:
        files = (path for path in student.rglob("*") if path.is_file() and not path.name.startswith("."))
        for path in sorted(files, key=lambda path: (path.name == MLMODEL, path)):
            store.upload(path.relative_to(student).as_posix(), path)
    return uri
