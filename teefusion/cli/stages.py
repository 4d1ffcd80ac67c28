"""The commands of a run: the whole pipeline here, each stage alone, and the check before."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from teefusion.cli.command import command
from teefusion.cli.options import EVALUATE, RUN, TARGETS, TEACHER, TRAIN

if TYPE_CHECKING:
    from teefusion.settings import Settings
    from teefusion.workspace import StageResult


@command(*RUN)
def run(settings: Settings) -> dict[str, Any]:
    """Run the whole pipeline on this machine: prompts in, registered student out."""
    from teefusion.pipelines.local import run as run_pipeline
    from teefusion.stages.summary import summary_text

    summary: dict[str, Any] = run_pipeline(settings)
    return summary | {"_text": summary_text(summary)}


@command("prompts")
def ingest(settings: Settings) -> dict[str, Any]:
    """Read, normalise, deduplicate and split prompts."""
    from teefusion.stages.ingest import ingest as stage

    return _shown(stage(settings))


@command(*TARGETS, group=True, pinned=False)
@click.option(
    "--estimate",
    is_flag=False,
    flag_value="H100-SXM",
    metavar="[DEVICE]",
    help="Say what the set will take on such GPUs, and make nothing: H200, H100-SXM (the default), A100, ..., or "
    "NAME:TFLOPS with the dense bfloat16 peak.",
)
@click.option("--utilisation", type=float, help="Estimate: share of the peak that is reached.  [default: 0.4, a guess]")
@click.option("--prompt-count", type=int, help="Estimate: distinct prompts.  [default: one a trajectory]")
def targets(
    settings: Settings, estimate: str | None, utilisation: float | None, prompt_count: int | None
) -> dict[str, Any]:
    """Sample the teacher's trajectories and store states and velocities.

    Continues where it stopped. Any number of machines may do so at once, each by this command with the same settings
    and a --storage that all of them reach.
    """
    if estimate:
        from teefusion.estimates import estimate_targets, text

        prompts = (prompt_count, prompt_count) if prompt_count else None
        estimated = estimate_targets(settings, estimate, utilisation=utilisation, prompts=prompts)
        return estimated.to_dict() | {"_text": text(estimated)}
    from teefusion.sources import pin
    from teefusion.stages.targets import targets as stage

    settings = pin(settings)
    return _shown(stage(settings, _prompts(settings)))


@command(*TARGETS, parent=targets)
@click.argument("uri", required=False)
@click.option("--repair", is_flag=True, help="Make anew what is bad, from these settings.")
def verify(settings: Settings, uri: str | None, repair: bool) -> dict[str, Any]:
    """Check every file of a target set against its manifest, and name what is bad.

    The set is the folder or s3:// URI given, else that of these settings. Exit code 1 where something bad is left.
    """
    from teefusion.stages.targets import target_uri, verify_targets

    prompts = _prompts(settings)
    result = verify_targets(settings, uri or target_uri(settings, prompts), prompts if repair else None)
    lines = [f"{name}: {why}" for name, why in result["bad"].items()]
    last = f"{result['files']} files, {result['bytes']:,} bytes: " + (
        "all good" if not lines else f"{len(lines)} bad{', made anew' if repair else ''}"
    )
    return result | {"_text": "\n".join([*lines, last]), "_exit": int(bool(lines) and not repair)}


@command(*TEACHER, *TRAIN, "tracking-uri", "device", pinned=False)
@click.option(
    "--estimate",
    is_flag=False,
    flag_value="H100-SXM",
    metavar="[DEVICE]",
    help="Say what memory each ZeRO stage takes on such GPUs, and do nothing; devices as of `targets --estimate`.",
)
@click.option("--dry-run", is_flag=True, help="Take a few steps, say what they took, and keep nothing.")
def train(settings: Settings, estimate: str | None, dry_run: bool) -> dict[str, Any]:
    """Distil a student from stored targets; continues from its last checkpoint."""
    if estimate:
        from teefusion.training_memory import estimate_memory, memory_text

        estimated = estimate_memory(settings, cpu=settings.device == "cpu")
        return estimated | {"_text": memory_text(estimated, estimate)}
    from teefusion.sources import pin
    from teefusion.stages.train import dry_run as trial
    from teefusion.stages.train import train as stage

    settings = pin(settings)
    if dry_run:
        from teefusion.training_memory import trial_text

        prompts = _prompts(settings)
        tried = trial(settings, prompts, _targets(settings, prompts))
        return tried | {"_text": trial_text(tried)}
    prompts = _prompts(settings)
    result = stage(settings, prompts, _targets(settings, prompts))
    shown = _shown(result)
    return {key: value for key, value in shown.items() if not key.endswith("_curve") and "residual_by" not in key}


@command(*TEACHER, *TRAIN, *EVALUATE, "device")
@click.option("--student", type=click.Path(path_type=Path), help="Student folder.  [default: these settings']")
@click.option(
    "--images", type=click.Path(path_type=Path), help="Only score ready-made pictures, DIR/<style>/<index>.jpg."
)
def evaluate(settings: Settings, student: Path | None, images: Path | None) -> dict[str, Any]:
    """Compare student and teacher on held-out prompts, decide the gate, write the report.

    With --images nothing is drawn or decided: pictures that are there already, of all prompts of --prompts in the
    HPS benchmark's layout, are scored by style and overall.
    """
    if images:
        from teefusion.ready_pictures import score_pictures, table

        scored = score_pictures(settings, images)
        return scored | {"_text": table(scored)}
    from teefusion.stages.evaluate import evaluate as stage

    prompts = _prompts(settings)
    result = stage(settings, prompts, student or _student(settings, prompts))
    return _shown(result) | {"report": str(Path(result.output) / "report.html")}


@command(*RUN)
def register(settings: Settings) -> dict[str, Any]:
    """Register the student in MLflow as challenger, if its gate passed."""
    from teefusion.stages.evaluate import evaluation_folder
    from teefusion.stages.register import register as stage

    prompts = _prompts(settings)
    student = _student(settings, prompts)
    return _shown(stage(settings, student, evaluation_folder(settings, prompts, student)))


@command(*RUN, pinned=False)
def preflight(settings: Settings) -> dict[str, Any]:
    """Check all that a run would need, here, and say at once everything that is wrong."""
    from teefusion.preflight import preflight as check
    from teefusion.preflight import require_ready

    _, findings = check(settings)
    require_ready(findings)
    found = {finding.check: finding.text for finding in findings}
    return found | {"_text": "\n".join(f"{name:20} {text}" for name, text in found.items())}


def _prompts(settings: Settings) -> Path:
    """The prompt set, made if it is not there: it costs next to nothing."""
    from teefusion.stages.ingest import ingest as stage

    return Path(stage(settings).output)


def _targets(settings: Settings, prompts: Path) -> str:
    from teefusion.stages.targets import require_targets

    return require_targets(settings, prompts)


def _student(settings: Settings, prompts: Path) -> Path:
    from teefusion.stages.train import student_folder
    from teefusion.workspace import require

    folder = student_folder(settings, _targets(settings, prompts))
    return require(folder, command="teefusion train", what="student")


def _shown(result: StageResult) -> dict[str, Any]:
    whole = result.to_dict()
    details: dict[str, Any] = whole["details"]
    return {key: whole[key] for key in ("stage", "output", "reused", "seconds")} | details
