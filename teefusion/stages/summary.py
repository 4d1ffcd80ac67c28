"""The summary of a run, from the records of its stages; written whether the run ended well or not."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from teefusion.files import write_bytes, write_json
from teefusion.settings import Settings
from teefusion.workspace import Workspace

log = logging.getLogger(__name__)


def summarize(settings: Settings, *, error: str | None = None) -> dict[str, Any]:
    """Write ``<workdir>/summary.json`` and ``report.html`` and return the summary.

    A stage that did not run leaves its keys null. ``error`` is the failed stage's message.
    """
    workspace = Workspace(settings)
    records = workspace.records()
    summary = _summary(settings, records) | {"error": error}
    report = Path(records["evaluate"]["output"]) / "report.html" if "evaluate" in records else None
    if report is not None and report.exists():
        write_bytes(workspace.root / "report.html", report.read_bytes())
        summary["report"] = str(workspace.root / "report.html")
    write_json(workspace.run / "summary.json", summary)
    if error or not all(record["reused"] for record in records.values()):
        _track(settings, summary)
    shutil.copyfile(workspace.run / "summary.json", workspace.root / "summary.json")
    return summary


def _track(settings: Settings, summary: dict[str, Any]) -> None:
    """Scores, verdict and report into the MLflow run, which is over; the summary stands without it."""
    from teefusion.errors import TrackingError
    from teefusion.tracking import Tracker

    try:
        tracker = Tracker.open(settings)
    except TrackingError as error:
        log.warning("%s", error)
        return
    for row, scores in (summary["scores"] or {}).items():
        tracker.log_metrics({f"score/{row}/{style}": score for style, score in scores.items()})
    if summary["gate"]:
        tracker.set_tags({"teefusion.gate": "passed" if summary["gate"]["passed"] else "failed"})
    if summary["report"]:
        tracker.log_file(Path(summary["report"]))
    tracker.finish(failed=summary["error"] is not None)
    tracker.close()


def _summary(settings: Settings, records: dict[str, dict[str, Any]]) -> dict[str, Any]:
    evaluation = records.get("evaluate", {}).get("details", {})
    training = records.get("train", {}).get("details", {})
    registered = records.get("register", {}).get("details", {})
    scores = evaluation.get("scores")
    gate = evaluation.get("gate")
    compared = ("teacher", "student")
    return {
        "run_key": settings.run_key,
        "teacher": settings.teacher.name,
        "strategy": settings.strategy.name,
        "guidance_residual": training.get("guidance_residual"),
        "scores": scores and {r: {k: v["mean"] for k, v in styles.items()} for r, styles in scores.items()},
        "benchmark": evaluation.get("benchmark"),
        "scorer": evaluation.get("scorer"),
        "nfe": evaluation and {row: evaluation["nfe"][row] for row in compared},
        "seconds_per_image": evaluation and {row: evaluation["seconds_per_image"][row]["median"] for row in compared},
        "gate": gate and {"passed": gate["passed"], "reasons": gate["reasons"]},
        "model": {
            "name": settings.model_name,
            "version": registered.get("version"),
            "aliases": registered.get("aliases", []),
        },
        "stages": {name: {k: record[k] for k in ("seconds", "reused")} for name, record in records.items()},
        "report": None,
        "student": training.get("student"),
    }


def summary_text(summary: dict[str, Any]) -> str:
    """The summary as a person reads it at the end of a run."""
    scores, nfe, seconds = summary["scores"], summary["nfe"], summary["seconds_per_image"]
    gate, model = summary["gate"], summary["model"]
    styles = [name for name in scores["teacher"] if name != "overall"]
    lines = [
        "",
        f"  {'score':<12}" + "".join(f"{name:>14}" for name in ("overall", *styles)),
        *(
            f"  {row:<12}" + "".join(f"{scores[row][name]:>14.2f}" for name in ("overall", *styles))
            for row in ("unguided", "teacher", "student")
        ),
        "",
        f"  forwards a picture   teacher {nfe['teacher']:g}, student {nfe['student']:g}",
        f"  seconds a picture    teacher {seconds['teacher']:.3f}, student {seconds['student']:.3f}"
        f"  ({seconds['teacher'] / seconds['student']:.2f} times faster)",
        f"  guidance residual    {summary['guidance_residual']:.3f}  (1: no guidance learned, 0: perfect)",
        f"  gate                 {'passed' if gate['passed'] else 'NOT passed'}",
        *(f"    - {reason}" for reason in gate["reasons"]),
        f"  model                {_model_text(model)}",
        f"  student              {summary['student']}",
        f"  report               {summary['report']}",
    ]
    return "\n".join(lines)


def _model_text(model: dict[str, Any]) -> str:
    if model["version"] is None:
        return f"{model['name']}: nothing registered"
    return f"{model['name']} version {model['version']}, alias {', '.join(model['aliases']) or 'none'}"
