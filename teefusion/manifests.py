"""The manifest of a target set, and the content keys of target sets and students. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from teefusion.errors import IntegrityError
from teefusion.settings import Settings
from teefusion.storage import content_key, read_json, write_json

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
Split = Literal["train", "heldout"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileRecord(_Model):
    """One file of a target set, by content."""

    name: str
    rows: int
    bytes: int
    sha256: str
    forwards: int = 0
    """Transformer forwards that it took."""


class SplitRecord(_Model):
    """The files of one split, in order."""

    states: tuple[FileRecord, ...]
    embeddings: tuple[FileRecord, ...]
    prompts_per_block: int

    @property
    def rows(self) -> int:
        """States in the split."""
        return sum(record.rows for record in self.states)


class Manifest(_Model):
    """What a target set is and holds."""

    schema_version: int
    key: str
    teacher: dict[str, Any]
    strategy: dict[str, Any]
    targets: dict[str, Any]
    prompt_set: str
    sigmas: tuple[float, ...]
    latent_shape: tuple[int, int, int]
    forwards: int
    null: FileRecord
    train: SplitRecord
    heldout: SplitRecord


def target_key(settings: Settings, prompt_set: str) -> str:
    """Name of a target set: a hash of teacher, strategy, target settings and prompts."""
    return content_key(
        {
            "schema_version": SCHEMA_VERSION,
            "teacher": settings.teacher.content(),
            "strategy": settings.strategy.content(),
            "targets": settings.targets.content(),
            "prompt_set": prompt_set,
        }
    )


def student_key(settings: Settings, target_set: str) -> str:
    """Name of a student: a hash of the targets it learned from and of how."""
    return content_key(
        {
            "target_set": target_set,
            "fusion": settings.fusion.content(),
            "student": settings.student.content(),
            "train": settings.train.content(),
        }
    )


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Publish the manifest, which makes the folder a target set."""
    write_json(folder / MANIFEST, manifest.model_dump(mode="json"))


def read_manifest(folder: Path, *, teacher_revision: str | None = None) -> Manifest:
    """A target set's manifest. Raises IntegrityError if missing, of another schema version or of another teacher."""
    path = folder / MANIFEST
    if not path.exists():
        raise IntegrityError(f"{folder} is no finished target set: {MANIFEST} is missing. Run 'teefusion targets'.")
    values = read_json(path)
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise IntegrityError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}. Use the teefusion version that "
            "wrote it, or delete the folder and run 'teefusion targets' again."
        )
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(
            f"{path} is not a valid manifest: {where}: {first['msg']}. Delete it and run 'teefusion targets' again."
        ) from error
    found = manifest.teacher.get("revision")
    if teacher_revision is not None and found != teacher_revision:
        raise IntegrityError(
            f"{path} was made by teacher {manifest.teacher.get('name')} at revision {found}, this run distils revision "
            f"{teacher_revision}. Run 'teefusion targets' for this teacher."
        )
    return manifest
