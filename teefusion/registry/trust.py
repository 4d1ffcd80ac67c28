"""What whoever loads a model calls: from a name to a local folder that may be trusted."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from teefusion.errors import NoVersionError, RegistryError
from teefusion.registry.sources import fetch_verified
from teefusion.registry.versions import Version, require_digest, version_by_alias, version_by_number
from teefusion.settings import Settings
from teefusion.tracking import connect, has_registry

SCHEME = "models:/"
_REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<number>[0-9]+))")
# What diffusers needs of a hub repository; no pickles.
_HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.md")


@dataclass(frozen=True)
class TrustedModel:
    """A student folder on this machine. Name, version and digest are none for a folder or hub id given as such."""

    folder: Path
    name: str | None = None
    version: str | None = None
    digest: str | None = None


def resolve(uri: str, settings: Settings) -> TrustedModel:
    """The student that ``models:/NAME@alias``, ``models:/NAME/VERSION``, a folder or a hub id (``org/name``) means.

    A registered one is fetched where it lies elsewhere, and its digest verified now. By an alias only a version is
    taken whose gate passed or was overridden, whoever moved the alias. Raises RegistryError saying how to put it right,
    TrackingError, StorageError.
    """
    if not uri.startswith(SCHEME):
        return TrustedModel(_folder_or_hub(uri))
    version = _find(uri, settings)
    digest = require_digest(version)
    folder = fetch_verified(settings, version.source, digest, what=str(version))
    return TrustedModel(folder, version.name, version.number, digest)


def find_champion(settings: Settings) -> TrustedModel | None:
    """The version of this model that has the alias ``evaluate.champion``; none where no alias, model or registry is.

    Raises as ``resolve`` for a version that may not be trusted.
    """
    alias = settings.evaluate.champion
    if not alias or not has_registry(settings):
        return None
    try:
        return resolve(f"{SCHEME}{settings.model_name}@{alias}", settings)
    except NoVersionError:
        return None


def version_of(uri: str, settings: Settings) -> str | None:
    """The version that a ``models:/`` URI means now, and none for a folder or hub id. Fetches and verifies nothing.

    For a follower to see that an alias moved. Raises as ``resolve`` does where the version may not be trusted.
    """
    return _find(uri, settings).number if uri.startswith(SCHEME) else None


def _find(uri: str, settings: Settings) -> Version:
    match = _REGISTERED.fullmatch(uri)
    if match is None:
        raise RegistryError(f"{uri} names no version: write models:/NAME@alias or models:/NAME/VERSION.")
    name, alias, number = match["name"], match["alias"], match["number"]
    client = connect(settings)
    if alias is None:
        return version_by_number(client, settings, name, number)
    version = version_by_alias(client, settings, name, alias)
    if objection := version.objection():
        raise RegistryError(
            f"The alias {alias} of {name} points to version {version.number}, which may not be used: {objection}. "
            f"Was it moved by hand? Put it right by 'teefusion rollback {name}' or 'teefusion promote {name} VERSION'; "
            f'to use this one all the same: teefusion promote {name} {version.number} --override "REASON".'
        )
    return version


def _folder_or_hub(uri: str) -> Path:
    folder = Path(uri)
    if folder.is_dir():
        return folder.resolve()
    if uri.count("/") != 1 or uri.startswith((".", "/", "~")):
        raise RegistryError(
            f"There is no folder {uri}. Give a student folder, a hub id (org/name), models:/NAME@alias or "
            "models:/NAME/VERSION."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(uri, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise RegistryError(
            f"{uri} is no folder here, and cannot be had from the hub: {error}. Check the id, the network and, for a "
            "gated model, HF_TOKEN."
        ) from error
