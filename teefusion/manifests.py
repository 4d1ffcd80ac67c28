"""The manifest of a target set, and the content keys of target sets and students. Imports no torch."""

from __future__ import annotations

import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from teefusion.errors import IntegrityError, NotFoundError
from teefusion.files import content_key, json_bytes
from teefusion.settings import Settings
from teefusion.storage import Reader, Store

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"
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


class Plan(_Model):
    """What a set will be: written before its first shard, so that every worker makes the same."""

    schema_version: int
    key: str
    teacher: dict[str, Any]
    strategy: dict[str, Any]
    targets: dict[str, Any]
    prompt_set: str


class Manifest(Plan):
    """What a target set is and holds."""

    sigmas: tuple[float, ...]
    latent_shape: tuple[int, int, int]
    forwards: int
    null: FileRecord
    train: SplitRecord
    heldout: SplitRecord
    digest: str = ""
    """Over everything else; ``write_manifest`` fills it in."""

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the set."""
        return (self.null, *(r for split in (self.train, self.heldout) for r in (*split.embeddings, *split.states)))


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


def write_manifest(store: Store, manifest: Manifest) -> Manifest:
    """Publish the manifest, which makes the folder or prefix a target set; returns it with its digest."""
    signed = manifest.model_copy(update={"digest": _digest(manifest)})
    store.write(MANIFEST, json_bytes(signed.model_dump(mode="json")))
    return signed


def read_manifest(store: Reader, *, teacher_revision: str | None = None) -> Manifest:
    """A target set's manifest. Raises IntegrityError if it is missing, damaged, of another version or teacher."""
    path = store.where(MANIFEST)
    try:
        data = store.read(MANIFEST)
    except NotFoundError as error:
        raise IntegrityError(
            f"{store.uri} is no finished target set: {MANIFEST} is missing. Run 'teefusion targets' first."
        ) from error
    manifest = _parse(data, path)
    found = manifest.teacher.get("revision")
    if teacher_revision is not None and found != teacher_revision:
        raise IntegrityError(
            f"{path} was made by teacher {manifest.teacher.get('name')} at revision {found}, this run distils revision "
            f"{teacher_revision}. Run 'teefusion targets' for this teacher."
        )
    return manifest


def _parse(data: bytes, path: str) -> Manifest:
    advice = "Run 'teefusion targets verify --repair' with the settings that made it."
    try:
        values = json.loads(data)
    except ValueError as error:
        raise IntegrityError(f"{path} is corrupt: it is not valid JSON ({error}). {advice}") from error
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
        raise IntegrityError(f"{path} is not a valid manifest: {where}: {first['msg']}. {advice}") from error
    # Byte for byte: the digest covers the values, and this their spelling.
    if manifest.digest != _digest(manifest) or data != json_bytes(manifest.model_dump(mode="json")):
        raise IntegrityError(f"{path} is corrupt: its content does not have the digest it states. {advice}")
    return manifest


def _digest(manifest: Manifest) -> str:
    return content_key(manifest.model_dump(mode="json", exclude={"digest"}), length=64)
