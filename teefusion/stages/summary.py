"""The summary of a run, from the records of its stages; written whether the run ended well or not."""

from __future__ import annotations

import logging
import shutil
import signal
from pathlib import Path
from typing import Any, Literal

from teefusion.errors import InterruptedRunError
from teefusion.files import plain_name, write_bytes, write_json
from teefusion.settings import Settings
from teefusion.workspace import StageResult, Workspace

log = logging.getLogger(__name__)
ROW_ORDER = ("unguided", "cfg", "cfg_matched", "teacher", "student", "champion")


Outcome = Literal["registered", "rejected", "failed", "cancelled"]
_STATUS: dict[Outcome, Literal["FINISHED", "FAILED", "KILLED"]] = {
    "registered": "FINISHED",
    "rejected": "FINISHED",
    "failed": "FAILED",
    "cancelled": "KILLED",
}
STOPPED = frozenset({InterruptedRunError.exit_code, 128 + signal.SIGINT, 128 + signal.SIGTERM})
"""Exit codes of a step that was told to stop."""


def outcome_of(workspace: Workspace, state: str) -> Outcome:
    """What became of a run that ended in a state of Kubeflow Pipelines, which takes a stopped step for a failed one."""
    if state == "SUCCEEDED":
        return "registered" if "register" in workspace.records() else "rejected"
    failure = workspace.failure()
    return "cancelled" if state.startswith("CANCEL") or (failure and failure["exit_code"] in STOPPED) else "failed"


def summarize(settings: Settings, *, outcome: Outcome, error: str | None = None) -> dict[str, Any]:
    """Write ``<workdir>/summary.json`` and ``report.html`` and return the summary.

    A stage that did not run leaves its keys null. ``error`` is the failed stage's message.
    """
    workspace = Workspace(settings)
    records = workspace.records()
    summary = _summary(settings, records) | {"error": error, "outcome": outcome}
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
        tracker.log_metrics({f"score/{row}/{plain_name(style)}": score for style, score in scores.items()})
    if summary["gate"]:
        tracker.set_tags({"teefusion.gate": "passed" if summary["gate"]["passed"] else "failed"})
    if summary["report"]:
        tracker.log_file(Path(summary["report"]))
    tracker.set_tags({"teefusion.outcome": summary["outcome"]})
    tracker.finish(_STATUS[summary["outcome"]])
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
        "gate": gate and {name: gate[name] for name in ("passed", "outcome", "reasons")},
        "model": {
            "name": settings.model_name,
            "version": registered.get("version"),
            "aliases": registered.get("aliases", []),
        },
        "stages": {name: {k: record[k] for k in ("seconds", "reused")} for name, record in records.items()},
        "report": None,
        "student": training.get("student"),
    }


def scores_of(evaluation: dict[str, Any]) -> dict[str, float]:
    """What a list of runs is compared by, of an evaluation's details."""
    means = {f"score_{row}": evaluation["scores"][row]["overall"]["mean"] for row in ("teacher", "student")}
    return means | {f"nfe_{row}": evaluation["nfe"][row] for row in ("teacher", "student")}


def verdict_markdown(evaluation: dict[str, Any]) -> str:
    """The verdict with its reasons and the scores by style, of an evaluation's details."""
    gate, scores = evaluation["gate"], evaluation["scores"]
    styles = list(scores["teacher"])
    rows = [
        f"| {row} | " + " | ".join(f"{scores[row][style]['mean']:.2f}" for style in styles) + " |"
        for row in ("unguided", "teacher", "student")
    ]
    return "\n".join(
        [
            f"## Gate {'passed' if gate['passed'] else 'NOT passed'}",
            "",
            *(f"- {reason}" for reason in gate["reasons"]),
            "",
            f"| score | {' | '.join(styles)} |",
            "| --- |" + " --- |" * len(styles),
            *rows,
            "",
            f"Forwards a picture: teacher {evaluation['nfe']['teacher']:g}, student {evaluation['nfe']['student']:g}.",
            "",
        ]
    )


def record_markdown(result: StageResult) -> str:
    """What a stage made, and where, as a table."""
    told = {"found made" if result.reused else "made": result.output, "seconds": f"{result.seconds:.1f}"}
    return _table(result.stage, told | result.details)


def outcome_markdown(summary: dict[str, Any]) -> str:
    """What became of a run, and what each of its stages took, of its summary."""
    facts = {key: summary[key] for key in ("error", "teacher", "strategy", "run_key", "student", "report")}
    gate, model = summary["gate"] and summary["gate"]["outcome"], _model_text(summary["model"])
    seconds = {
        name: "found made" if stage["reused"] else f"{stage['seconds']:.1f} s"
        for name, stage in summary["stages"].items()
    }
    told = {"gate": gate, "model": model} | facts | seconds
    return _table(f"Run {summary['outcome']}", {name: value for name, value in told.items() if value is not None})


def _table(title: str, facts: dict[str, Any]) -> str:
    rows = [f"| {name.replace('_', ' ')} | {_cell(value)} |" for name, value in facts.items()]
    return "\n".join([f"## {title}", "", "| | |", "| --- | --- |", *rows, ""])


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}: {inner}" for name, inner in value.items()]
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.replace("|", "\\|").split())


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
            for row in sorted(scores, key=ROW_ORDER.index)
        ),
        "",
        f"  forwards a picture   teacher {nfe['teacher']:g}, student {nfe['student']:g}",
        f"  seconds a picture    teacher {seconds['teacher']:.3f}, student {seconds['student']:.3f}"
        f"  ({seconds['teacher'] / seconds['student']:.2f} times faster)",
        f"  guidance residual    {summary['guidance_residual']:.3f}  (1: no guidance learned, 0: perfect)",
        f"  gate                 {gate['outcome'] if gate['passed'] else gate['outcome'].upper()}",
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
