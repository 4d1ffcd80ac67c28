"""A version of a registered model as it is stored, and whether it may be trusted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from teefusion.errors import RegistryError
from teefusion.settings import Settings
from teefusion.tracking import mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

CHALLENGER, CHAMPION, PREVIOUS = "challenger", "champion", "previous"
DIGEST_TAG = "student_digest"
GATE_TAG = "gate"
GATE_PASSED = "passed"
OVERRIDE_TAG = "override"


@dataclass(frozen=True)
class Version:
    """One version. ``tags`` are what registration and promotion wrote."""

    name: str
    number: str
    source: str
    tags: Mapping[str, str]
    run_id: str = ""
    description: str = ""
    created_ms: int = 0
    aliases: tuple[str, ...] = field(default=())
    """Empty where it comes from a search, which leaves them out."""

    @classmethod
    def of(cls, found: Any) -> Version:
        """From MLflow's own."""
        return cls(
            name=found.name,
            number=str(found.version),
            source=found.source,
            tags=dict(found.tags),
            run_id=found.run_id or "",
            description=found.description or "",
            created_ms=found.creation_timestamp,
            aliases=tuple(sorted(found.aliases or ())),
        )

    @property
    def override(self) -> dict[str, str] | None:
        """Who promoted it against the gate or its digest, why, and the digest it had then."""
        try:
            value = json.loads(self.tags[OVERRIDE_TAG])
        except (KeyError, ValueError):
            return None
        return value if isinstance(value, dict) else None

    @property
    def digest(self) -> str | None:
        """Of the folder that may be loaded: as registered, or as it was when an override accepted it."""
        override = self.override
        return override["digest"] if override and "digest" in override else self.tags.get(DIGEST_TAG)

    def objection(self) -> str | None:
        """Why it may not become champion, nor be loaded by an alias; none where its gate passed or was overridden."""
        if self.override or self.tags.get(GATE_TAG) == GATE_PASSED:
            return None
        if GATE_TAG in self.tags:
            return f"its gate did not pass ({self.tags[GATE_TAG]})"
        return "its gate did not run"

    def __str__(self) -> str:
        return f"{self.name} version {self.number}"


def version_by_alias(client: MlflowClient, settings: Settings, name: str, alias: str) -> Version:
    """The version an alias names. Raises NoVersionError where there is none, TrackingError."""
    with mlflow_errors(settings, f"look up {name}@{alias}", missing=f"{name} has no version with the alias {alias}"):
        return Version.of(client.get_model_version_by_alias(name, alias))


def version_by_number(client: MlflowClient, settings: Settings, name: str, number: str) -> Version:
    """A version. Raises NoVersionError where there is none, TrackingError."""
    with mlflow_errors(settings, f"look up {name} version {number}", missing=f"{name} has no version {number}"):
        return Version.of(client.get_model_version(name, number))


def require_digest(version: Version) -> str:
    """The digest its folder must have. Raises RegistryError for a version without one."""
    if version.digest is None:
        raise RegistryError(
            f"{version} has no tag {DIGEST_TAG}, so nothing says which files it means: it was not registered by "
            "'teefusion register'. Register the student so, and promote that version."
        )
    return version.digest
