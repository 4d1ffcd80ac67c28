"""Registration: a version of the student in MLflow, with the alias ``challenger``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from teefusion.errors import UsageError
from teefusion.files import plain_name, read_json
from teefusion.lineage import LINEAGE, UNKNOWN
from teefusion.registry import register as register_version
from teefusion.registry.card import model_card
from teefusion.registry.versions import GATE_PASSED, GATE_TAG
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

    training = result.get("training", {})
    lineage = dict.fromkeys(LINEAGE, UNKNOWN) | training.get("lineage", {})

    def work() -> tuple[dict[str, Any], bool]:
        card = model_card(settings, result, lineage)
        tags = _tags(settings, student, result) | lineage
        return register_version(settings, student, tags, card, training.get("libraries", {}))

    return workspace.stage("register", student, work)


def _tags(settings: Settings, student: Path, result: dict[str, Any]) -> dict[str, Any]:
    tags = {
        "teacher": settings.teacher.name,
        "teacher_revision": settings.teacher.revision,
        "strategy": settings.strategy.name,
        "prompts_sha256": settings.prompts.sha256,
        "student_key": student.parent.name,
        "guidance_residual": f"{result['guidance_residual']:.4f}",
        GATE_TAG: GATE_PASSED,
        "scorer": result["scorer"]["name"],
        "scorer_sha256": result["scorer"]["weights_sha256"],
    }
    tags |= {f"nfe_{row}": f"{result['nfe'][row]:g}" for row in ("teacher", "student")}
    for row in ("teacher", "student"):
        tags |= {
            f"score_{row}_{plain_name(style)}": f"{value['mean']:.4f}" for style, value in result["scores"][row].items()
        }
    return tags
