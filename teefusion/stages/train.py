"""Distillation: a student from a target set."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from teefusion.files import read_json
from teefusion.launch import run_training
from teefusion.manifests import read_manifest, student_key
from teefusion.settings import Settings
from teefusion.storage import open_store
from teefusion.workspace import StageResult, Workspace

RESULT = "training.json"
STUDENT = "student"


def student_folder(settings: Settings, targets: str) -> Path:
    """Where the student of these settings and this target set lies, made or not."""
    manifest = read_manifest(open_store(targets, settings.storage), teacher_revision=settings.teacher.revision)
    return Workspace(settings).folder("students", student_key(settings, manifest.key)) / STUDENT


def dry_run(settings: Settings, prompts: Path, targets: str) -> dict[str, Any]:
    """Take a few steps of the training of pinned settings; what they took. Keeps nothing. Raises as ``train``."""
    with tempfile.TemporaryDirectory() as folder:
        return run_training(settings, prompts=prompts, targets=targets, output=Path(folder), dry_run=True)


def train(settings: Settings, prompts: Path, targets: str) -> StageResult:
    """Train the student of pinned settings, or find it. Raises IntegrityError, TrainingError, TrackingError."""
    workspace = Workspace(settings)
    manifest = read_manifest(open_store(targets, settings.storage), teacher_revision=settings.teacher.revision)
    output = student_folder(settings, targets).parent

    def work() -> tuple[dict[str, Any], bool]:
        reused = (output / RESULT).exists()
        record = (
            read_json(output / RESULT)
            if reused
            else run_training(settings, prompts=prompts, targets=targets, output=output)
        )
        keys = ("guidance_residual", "residual_by_guidance", "residual_curve", "loss_curve", "parameters", "fusion")
        details = {key: record[key] for key in keys}
        return details | {"student": str(output / STUDENT), "target_set": manifest.key}, reused

    return workspace.stage("train", output, work)
