"""Teacher targets: sample trajectories, store states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teefusion.manifests import MANIFEST, read_manifest, target_key
from teefusion.prompts import load_prompt_set
from teefusion.settings import Settings
from teefusion.workspace import StageResult, Workspace


def target_folder(settings: Settings, prompts: Path) -> Path:
    """Where the target set of these settings and this prompt set lies, made or not."""
    key = target_key(settings, load_prompt_set(prompts).sha256)
    return Workspace(settings).folder("targets", key)


def targets(settings: Settings, prompts: Path) -> StageResult:
    """Make the target set of pinned settings from a prompt set. Raises TeacherError, StorageError, IntegrityError."""
    workspace = Workspace(settings)
    prompt_set = load_prompt_set(prompts)
    output = target_folder(settings, prompts)

    def work() -> tuple[dict[str, Any], bool]:
        reused = (output / MANIFEST).exists()
        if not reused:
            from teefusion.targets import generate_targets

            generate_targets(settings, prompt_set, output)
        manifest = read_manifest(output, teacher_revision=settings.teacher.revision)
        details = {
            "target_set": manifest.key,
            "states": manifest.train.rows,
            "heldout_states": manifest.heldout.rows,
            "forwards": manifest.forwards,
            "bytes": sum(record.bytes for split in (manifest.train, manifest.heldout) for record in split.states),
        }
        return details, reused

    return workspace.stage("targets", output, work)
