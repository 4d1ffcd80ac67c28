"""Teacher targets: sample trajectories, store states; check and mend what is stored."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teefusion.manifests import MANIFEST, Manifest, read_manifest, target_key
from teefusion.prompts import load_prompt_set
from teefusion.settings import Settings
from teefusion.storage import open_store
from teefusion.workspace import StageResult, Workspace


def target_uri(settings: Settings, prompts: Path) -> str:
    """Where the target set of these settings and this prompt set lies, made or not."""
    return Workspace(settings).target_uri(target_key(settings, load_prompt_set(prompts).sha256))


def require_targets(settings: Settings, prompts: Path) -> str:
    """``target_uri``, once the set is there. Raises IntegrityError saying which command makes it."""
    uri = target_uri(settings, prompts)
    read_manifest(open_store(uri, settings.storage), teacher_revision=settings.teacher.revision)
    return uri


def targets(settings: Settings, prompts: Path) -> StageResult:
    """Make the target set of pinned settings from a prompt set. Raises TeacherError, StorageError, IntegrityError."""
    workspace = Workspace(settings)
    output = target_uri(settings, prompts)
    store = open_store(output, settings.storage)

    def work() -> tuple[dict[str, Any], bool]:
        reused = store.size(MANIFEST) is not None
        if not reused:
            from teefusion.launch import run_targets

            run_targets(settings, prompts=prompts, output=output)
        manifest = read_manifest(store, teacher_revision=settings.teacher.revision)
        return _details(manifest), reused

    return workspace.stage("targets", output, work)


def verify_targets(settings: Settings, uri: str, prompts: Path | None) -> dict[str, Any]:
    """Check a target set; with ``prompts``, make anew what is bad. Raises IntegrityError for a manifest past reading.

    Returns uri, files and bytes of the set, and what was bad: name by name, with the reason.
    """
    from teefusion.verify import repair, verify

    store = open_store(uri, settings.storage)
    bad = repair(settings, prompts, store) if prompts else {}
    manifest = read_manifest(store)
    bad = bad if prompts else verify(store, manifest)
    size = sum(record.bytes for record in manifest.files)
    return {"uri": uri, "files": len(manifest.files), "bytes": size, "bad": bad}


def _details(manifest: Manifest) -> dict[str, Any]:
    return {
        "target_set": manifest.key,
        "states": manifest.train.rows,
        "heldout_states": manifest.heldout.rows,
        "forwards": manifest.forwards,
        "bytes": sum(record.bytes for record in manifest.files),
    }
