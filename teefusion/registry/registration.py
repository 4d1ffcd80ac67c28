"""MLflow's model registry: a version that points at a student folder, with the tags that say where it came from."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teefusion.errors import TrackingError
from teefusion.files import sha256_folder
from teefusion.registry.versions import CHALLENGER, DIGEST_TAG
from teefusion.settings import Settings
from teefusion.tracking import Tracker, connect, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = logging.getLogger(__name__)
_KEY_TAG = "run_key"


def register(settings: Settings, student: Path, tags: dict[str, Any], description: str) -> tuple[dict[str, Any], bool]:
    """Make a version of this student, or find the one that is there, and give it the alias ``challenger``.

    Returns name, version, aliases and source, and whether the version was there already. Only a student whose gate
    passed may come here. Raises TrackingError.
    """
    from mlflow.exceptions import MlflowException

    client = connect(settings)
    name, digest = settings.model_name, sha256_folder(student)
    try:
        version = _find(client, name, digest, settings.run_key)
        reused = version is not None
        if version is None:
            _ensure_model(client, name)
            version = client.create_model_version(
                name,
                source=_source(settings, client, student),
                run_id=Tracker.open(settings).run_id,
                tags={key: str(value) for key, value in tags.items()}
                | {DIGEST_TAG: digest, _KEY_TAG: settings.run_key},
                description=description,
            )
        if CHALLENGER not in version.aliases:
            client.set_registered_model_alias(name, CHALLENGER, version.version)
        found = client.get_model_version(name, version.version)
    except MlflowException as error:
        raise TrackingError(f"MLflow refused to register {name}: {error}") from error
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


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _source(settings: Settings, client: MlflowClient, student: Path) -> str:
    """The folder itself where the registry is local; a server cannot see our disk, so there it is uploaded once."""
    if not tracking_uri(settings).startswith(("http://", "https://")):
        return str(student)
    run_id = Tracker.open(settings).run_id
    client.log_artifacts(run_id, str(student), "student")
    return f"{client.get_run(run_id).info.artifact_uri}/student"
