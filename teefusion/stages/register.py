"""Registration: a version of the student in MLflow, with the alias ``challenger``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teefusion.errors import UsageError
from teefusion.files import read_json
from teefusion.registry import register as register_version
from teefusion.settings import Settings
from teefusion.workspace import StageResult, Workspace, require


def register(settings: Settings, student: Path, evaluation: Path) -> StageResult:
    """Register a student whose gate passed. Raises UsageError for one that did not pass, TrackingError."""
    workspace = Workspace(settings)
    result = read_json(require(evaluation / "evaluation.json", command="teefusion evaluate", what="evaluation"))
    if not result["gate"]["passed"]:
        raise UsageError(
            "The gate did not pass, so nothing is registered:\n  " + "\n  ".join(result["gate"]["reasons"])
        )

    def work() -> tuple[dict[str, Any], bool]:
        return register_version(settings, student, _tags(settings, student, result), _description(settings, result))

    return workspace.stage("register", student, work)


def _tags(settings: Settings, student: Path, result: dict[str, Any]) -> dict[str, Any]:
    tags = {
        "teacher": settings.teacher.name,
        "teacher_revision": settings.teacher.revision,
        "strategy": settings.strategy.name,
        "prompts_sha256": settings.prompts.sha256,
        "student_key": student.parent.name,
        "guidance_residual": f"{result['guidance_residual']:.4f}",
        "gate": "passed",
        "scorer": result["scorer"]["name"],
        "scorer_sha256": result["scorer"]["weights_sha256"],
    }
    tags |= {f"nfe_{row}": f"{result['nfe'][row]:g}" for row in ("teacher", "student")}
    for row in ("teacher", "student"):
        tags |= {f"score_{row}_{style}": f"{value['mean']:.4f}" for style, value in result["scores"][row].items()}
    return tags


def _description(settings: Settings, result: dict[str, Any]) -> str:
    scores = {row: result["scores"][row]["overall"]["mean"] for row in ("teacher", "student")}
    return (
        f"TeEFusion student of {settings.teacher.name} ({settings.strategy.name}). Score {scores['student']:.2f} "
        f"(teacher {scores['teacher']:.2f}), {result['nfe']['student']:g} forwards a picture (teacher "
        f"{result['nfe']['teacher']:g}), guidance residual {result['guidance_residual']:.3f}."
    )
