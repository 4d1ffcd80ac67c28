"""The commands about the pipeline and its runs on a cluster: compile, publish, submit, schedule, runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from teefusion.cli.command import SOURCES, command
from teefusion.cli.options import RUN
from teefusion.errors import SettingsError, TeEFusionError

if TYPE_CHECKING:
    from teefusion.pipelines.submit import Kubeflow
    from teefusion.settings import Settings


@command(*RUN, pinned=False)
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("pipeline.yaml"), show_default=True, help="File to write."
)
@click.option("--kubernetes-manifests", is_flag=True, help="As resources Pipeline and PipelineVersion, not as IR YAML.")
def compile_(settings: Settings, output: Path, kubernetes_manifests: bool) -> dict[str, Any]:
    """Compile the pipeline to KFP IR YAML, with these settings as the defaults of its parameters."""
    from teefusion.pipelines.compile import compile_pipeline

    version = compile_pipeline(settings, output, kubernetes=kubernetes_manifests)
    return {"output": str(output), "version": version, "_text": str(output)}


@command(*RUN, "endpoint", pinned=False)
@click.option(
    "--teachers",
    type=click.Path(path_type=Path),
    help="YAML list of settings, one run each, as in docs/operations.md.",
)
@click.option("--wait", is_flag=True, help="Follow the runs to their end; exit code 1 unless all end well.")
@click.option("--dry-run", is_flag=True, help="Print what would be created, and ask nothing of Kubeflow.")
def submit(settings: Settings, teachers: Path | None, wait: bool, dry_run: bool) -> dict[str, Any]:
    """Run the pipeline on Kubeflow Pipelines; what runs already is joined."""
    from teefusion.pipelines.submit import Kubeflow, plan

    chosen = _of_teachers(teachers) if teachers else [settings]
    if dry_run:
        return {"runs": [plan(one).to_dict() for one in chosen]}
    kubeflow = Kubeflow(settings.kfp)
    submitted = [_submitted(kubeflow, one) for one in chosen]
    for run in submitted if wait else ():
        if "run_id" in run:
            click.echo(f"{run['name']}: {run['url']}", err=True)
            run["state"] = kubeflow.wait(run["run_id"])
    codes = [run.pop("exit_code", 0) or int(wait and run["state"] != "SUCCEEDED") for run in submitted]
    return {"runs": submitted, "_text": "\n".join(map(_line, submitted)), "_exit": max(codes)}


@command(*RUN, "endpoint", pinned=False)
@click.option("--cron", required=True, help="When, as in '0 3 * * 1': Mondays at three, in the server's time zone.")
@click.option("--name", help="Of the schedule; one of that name is replaced.  [default: teefusion-TEACHER]")
@click.option("--dry-run", is_flag=True, help="Print what would be created, and ask nothing of Kubeflow.")
def schedule(settings: Settings, cron: str, name: str | None, dry_run: bool) -> dict[str, Any]:
    """Run the pipeline again and again; each run looks up the teacher's newest revision."""
    from teefusion.pipelines.submit import Kubeflow, cron_of, plan

    wanted, name = plan(settings, pinned=False), name or settings.model_name
    if dry_run:
        return {"schedule": name, "cron": cron_of(cron), **wanted.to_dict()}
    made: dict[str, Any] = Kubeflow(settings.kfp).schedule(wanted, name, cron)
    replaced = " (replaced)" if made["replaced"] else ""
    return {"schedule": name, "cron": cron_of(cron), **made, "_text": f"{name}{replaced}: {made['url']}"}


@command(*RUN, "endpoint", pinned=False)
def publish(settings: Settings) -> dict[str, Any]:
    """Upload the pipeline to Kubeflow Pipelines with these settings as defaults, unless it is there."""
    from teefusion.pipelines.submit import Kubeflow, plan

    wanted = plan(settings, pinned=False)
    made: dict[str, Any] = Kubeflow(settings.kfp).publish(wanted)
    text = f"{wanted.upload}: {'uploaded' if made['uploaded'] else 'there already'}: {made['url']}"
    return {"pipeline": wanted.pipeline, "version": wanted.upload, **made, "_text": text}


@command("endpoint", pinned=False)
@click.option("--limit", type=click.IntRange(1, 200), default=20, show_default=True, help="How many, newest first.")
def runs(settings: Settings, limit: int) -> dict[str, Any]:
    """List runs on Kubeflow Pipelines: teacher, state, stage, verdict."""
    from teefusion.pipelines.submit import Kubeflow

    rows: list[dict[str, Any]] = Kubeflow(settings.kfp).runs(limit)
    return {"runs": rows, "_text": _table(rows)}


def _of_teachers(path: Path) -> list[Settings]:
    """Settings of each entry of a list, over the file's and below the command line's. Raises SettingsError."""
    import yaml

    from teefusion.settings import load_settings

    config, overrides = click.get_current_context().meta[SOURCES]
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"Cannot read the teachers {path}: {error}") from error
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, Mapping) for entry in entries):
        raise SettingsError(f"{path}: expected a list of settings such as `- teacher: {{name: sd3-medium}}`.")
    return [load_settings(config=config, overrides=overrides, entry=_entry(entry)) for entry in entries]


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """`teacher: NAME` is short for `teacher: {name: NAME}`."""
    teacher = entry.get("teacher")
    return {**entry, "teacher": {"name": teacher}} if isinstance(teacher, str) else dict(entry)


def _submitted(kubeflow: Kubeflow, settings: Settings) -> dict[str, Any]:
    """What became of one submission: one that is refused does not keep the others back."""
    from teefusion.pipelines.submit import plan

    known = {"teacher": settings.teacher.name}
    try:
        wanted = plan(settings)
        known |= {"name": wanted.name, "run_key": wanted.run_key, "version": wanted.version}
        return {**known, **kubeflow.submit(wanted)}
    except TeEFusionError as error:
        return known | {"error": str(error), "exit_code": error.exit_code}


def _line(run: dict[str, Any]) -> str:
    if "error" in run:
        return f"{run['teacher']}: not submitted. {run['error']}"
    how = run["state"].lower() if "state" in run else "at work already, joined" if run["attached"] else "submitted"
    return f"{run['name']}: {how}: {run['url']}"


def _table(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "No runs."
    columns = ("created_at", "teacher", "strategy", "state", "stage", "verdict", "run_id")
    cells = [columns, *([str(row[column] or "-") for column in columns] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(columns))]
    return "\n".join("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True)) for row in cells)
