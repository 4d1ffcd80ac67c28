"""Check a stored target set against its manifest, and make anew what is bad."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from teefusion.errors import IntegrityError
from teefusion.files import json_bytes
from teefusion.manifests import MANIFEST, FileRecord, Manifest, read_manifest, target_key
from teefusion.progress import Progress
from teefusion.prompts import load_prompt_set
from teefusion.settings import Settings
from teefusion.shards import finished, read_verified, record_file
from teefusion.storage import Store

_READERS = 8


def verify(store: Store, manifest: Manifest) -> dict[str, str]:
    """What is bad: file by file, and why; empty where every byte is as it was written. Raises StorageError."""

    def check(record: FileRecord) -> tuple[FileRecord, str]:
        try:
            read_verified(store, record)
        except IntegrityError as error:
            return record, str(error)
        return record, ""

    bad: dict[str, str] = {}
    files = manifest.files
    with ThreadPoolExecutor(_READERS) as readers, Progress("verify", total=len(files), unit="file") as progress:
        for record, damage in readers.map(check, files):
            progress.advance(1, bytes=record.bytes)
            if damage:
                bad[record.name] = damage
    return bad


def repair(settings: Settings, prompts: Path, store: Store) -> dict[str, str]:
    """Make anew what is bad of the set of these settings, the manifest too; returns what was.

    Raises IntegrityError where the settings are those of another set.
    """
    from teefusion.target_sets import generate_targets

    prompt_set = load_prompt_set(prompts)
    bad: dict[str, str] = {}
    try:
        manifest = read_manifest(store)
    except IntegrityError as error:
        bad[MANIFEST] = str(error)
        manifest = generate_targets(settings, prompt_set, store)
    asked = target_key(settings, prompt_set.sha256)
    if manifest.key != asked:
        raise IntegrityError(
            f"{store.uri} is target set {manifest.key}, these settings make {asked}. Give the settings that made it."
        )
    damaged = verify(store, manifest)
    for record in manifest.files:
        if record.name in damaged:
            store.delete(record_file(record.name))
        elif finished(store, record.name) != record:  # the manifest is what readers go by
            store.write(record_file(record.name), json_bytes(record.model_dump()))
    if damaged:
        generate_targets(settings, prompt_set, store)
    return bad | damaged
