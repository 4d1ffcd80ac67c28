"""Model versions of the registry as student folders: the champion of a comparison, and what ``compare`` is given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teefusion.errors import IntegrityError, StudentError, TrackingError
from teefusion.files import sha256_folder
from teefusion.settings import Settings
from teefusion.tracking import connect, tracking_uri
from teefusion.workspace import Workspace

SCHEME = "models:/"


@dataclass(frozen=True)
class ModelVersion:
    """A registered student whose gate passed and whose bytes are those that were registered."""

    name: str
    version: int
    folder: Path
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the place."""
        return {"name": self.name, "version": self.version, "digest": self.digest}


def find_champion(settings: Settings) -> ModelVersion | None:
    """The version that has the alias ``evaluate.champion``; none where no model or alias is there.

    Raises IntegrityError for a version that cannot be trusted, TrackingError.
    """
    alias = settings.evaluate.champion
    if not alias or not _is_there(settings):
        return None
    from mlflow.exceptions import MlflowException

    try:
        found = connect(settings).get_model_version_by_alias(settings.model_name, alias)
    except MlflowException as error:
        if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model, no such alias
            return None
        raise TrackingError(f"MLflow did not say which {settings.model_name} is {alias}: {error}") from error
    return _trusted(settings, found)


def find_version(settings: Settings, uri: str) -> ModelVersion:
    """The version that ``models:/NAME/VERSION`` or ``models:/NAME@alias`` names.

    Raises StudentError where there is none, IntegrityError for one that cannot be trusted, TrackingError.
    """
    from mlflow.exceptions import MlflowException

    name, _, alias = uri.removeprefix(SCHEME).partition("@")
    name, _, version = name.partition("/")
    if bool(alias) == bool(version):
        raise StudentError(f"{uri} names no model version. Write models:/NAME/VERSION or models:/NAME@ALIAS.")
    client = connect(settings)
    try:
        found = client.get_model_version_by_alias(name, alias) if alias else client.get_model_version(name, version)
    except MlflowException as error:
        raise StudentError(f"{uri} is not in the registry at {tracking_uri(settings)}: {error}") from error
    return _trusted(settings, found)


def _is_there(settings: Settings) -> bool:
    """Whether there is a registry to ask: a local one that nobody wrote to yet is not made, nor MLflow imported."""
    uri = tracking_uri(settings)
    return not uri.startswith("sqlite:///") or Path(uri.removeprefix("sqlite:///")).exists()


def _trusted(settings: Settings, found: Any) -> ModelVersion:
    """A version as folder, once its gate has passed and its bytes are those registered."""
    where = f"{found.name} version {found.version}"
    if found.tags.get("gate") != "passed":
        raise IntegrityError(
            f"The gate of {where} is {found.tags.get('gate') or 'not recorded'}, so nothing is compared with it. Give "
            "the alias to a version whose gate passed, or set evaluate.champion to null."
        )
    folder = _folder(settings, found)
    expected, digest = found.tags.get("student_digest"), sha256_folder(folder)
    if digest != expected:
        raise IntegrityError(
            f"{folder} is not what was registered as {where}: its digest is {digest[:12]}, registered was "
            f"{(expected or 'none')[:12]}. Restore it, or give the alias to another version."
        )
    return ModelVersion(found.name, int(found.version), folder, digest)


def _folder(settings: Settings, found: Any) -> Path:
    """Where the version points, fetched once where that is on a server."""
    source = str(found.source).removeprefix("file://")
    if Path(source).is_absolute():
        return _present(Path(source), found)
    digest = found.tags.get("student_digest", "")
    copy = Workspace(settings).folder("versions", digest[:16])
    if not copy.exists():
        from mlflow.artifacts import download_artifacts
        from mlflow.exceptions import MlflowException

        from teefusion.files import publish_folder

        try:
            with publish_folder(copy) as temporary:
                download_artifacts(found.source, dst_path=str(temporary), tracking_uri=tracking_uri(settings))
        except (MlflowException, OSError) as error:
            raise TrackingError(f"Cannot fetch {found.source} of {found.name} {found.version}: {error}") from error
    inner = [path.parent for path in copy.rglob("model_index.json")]
    return _present(inner[0] if inner else copy, found)


def _present(folder: Path, found: Any) -> Path:
    if not (folder / "model_index.json").exists():
        raise IntegrityError(
            f"{found.name} version {found.version} points at {folder}, where no student is. Restore it, or give the "
            "alias to another version."
        )
    return folder
