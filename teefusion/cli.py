"""The ``teefusion`` command. Imports lazily, so that help and mistakes answer at once.

Exit codes: 0 done, 1 something failed, 2 the request was wrong. Results go to standard output (one JSON object with
``--json``), everything else to standard error.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from teefusion import __version__, cli_kubeflow
from teefusion.errors import SettingsError, TeEFusionError, UsageError
from teefusion.registry_commands import COMMANDS

if TYPE_CHECKING:
    from teefusion.settings import Settings
    from teefusion.workspace import StageResult


# Flags that are called otherwise than their option, because two commands mean different settings by them.
_FLAGS = {"target-batch-size": "batch-size"}
# Options that stand for a setting: (dotted key, type, help) by name.
_SETTING_OPTIONS: dict[str, tuple[str, Any, str]] = {
    "teacher": ("teacher.name", str, "Preset, diffusers folder or hub id of the teacher.  [default: shapes]"),
    "revision": ("teacher.revision", str, "Hub commit of the teacher, or digest of its folder."),
    "prompts": ("prompts.source", str, "A .txt, .json, .jsonl, .csv or .parquet file.  [default: the preset's]"),
    "strategy": ("strategy.name", str, "How the teacher samples: euler_cfg, z_sampling or w2sd.  [default: euler_cfg]"),
    "num-steps": ("strategy.num_steps", int, "Steps of the teacher's sampling grid."),
    "guidance-min": ("strategy.guidance_min", float, "Smallest guidance scale taught (diffusers' s)."),
    "guidance-max": ("strategy.guidance_max", float, "Largest guidance scale taught (diffusers' s)."),
    "trajectories": ("targets.trajectories", int, "Teacher trajectories to store."),
    "storage": ("storage.uri", str, "Where target sets are kept: a folder or s3://bucket/prefix.  [default: workdir]"),
    "target-batch-size": ("targets.batch_size", str, "Trajectories sampled together, or auto."),
    "workers": ("targets.num_processes", int, "Target workers on this machine, one a GPU."),
    "fusion": ("fusion.variant", str, "Fused term: affine, balanced, paper, published, ...  [default: affine]"),
    "student-steps": ("student.num_steps", int, "Steps the student samples in.  [default: the teacher's]"),
    "steps": ("train.steps", int, "Optimizer steps."),
    "batch-size": ("train.batch_size", int, "States an optimizer step, over all ranks."),
    "learning-rate": ("train.learning_rate", float, "Peak learning rate."),
    "processes": ("train.num_processes", int, "Training ranks on this machine."),
    "guidance-scale": ("evaluate.guidance_scale", float, "Guidance of teacher and student in the comparison."),
    "scorer": (
        "evaluate.scorer",
        str,
        "hps:FILE, clip:FOLDER, pickscore:FOLDER, or a CLIP folder.  [default: the preset's]",
    ),
    "model-name": ("mlflow.model_name", str, "Registered model.  [default: teefusion-TEACHER]"),
    "tracking-uri": ("mlflow.tracking_uri", str, "MLflow server.  [default: SQLite in the workdir]"),
    "host": ("serve.host", str, "Address to listen on; 0.0.0.0 is every one of this machine.  [default: 127.0.0.1]"),
    "port": ("serve.port", int, "Port to listen on; 0 takes a free one.  [default: 8000]"),
    "device": ("device", str, "auto, cpu, cuda, cuda:1, ...  [default: auto]"),
    "endpoint": (
        "kfp.host",
        str,
        "Kubeflow Pipelines.  [default: KF_PIPELINES_ENDPOINT, else the kubeconfig's]",
    ),
}


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="teefusion")
def cli() -> None:
    """Distil guided text-to-image teachers into students that need one forward a step.

    Settings come from the command line, TEEFUSION_* variables (nested with two underscores, as in
    TEEFUSION_TRAIN__STEPS), --config FILE.yaml and the teacher's preset, in this order.
    """


def _command(
    *setting_options: str, pinned: bool = True, parent: click.Group = cli, group: bool = False
) -> Callable[[Callable[..., dict[str, Any]]], Any]:
    """A subcommand with the shared options and those of ``_SETTING_OPTIONS`` it names; one with its own, as ``group``.

    The function gets settings, pinned unless it needs neither teacher nor prompts, and its own options. It returns
    what ``--json`` prints; ``_text`` in it is what a person reads instead, ``_exit`` the exit code.
    """

    def decorate(function: Callable[..., dict[str, Any]]) -> click.Command:
        @functools.wraps(function)
        def invoke(
            config: Path | None, workdir: Path, sets: tuple[str, ...], as_json: bool, debug: bool, **options: Any
        ) -> None:
            if click.get_current_context().invoked_subcommand:
                return
            chosen = {name: options.pop(name.replace("-", "_")) for name in setting_options}
            with _report_errors(debug):
                overrides = {_SETTING_OPTIONS[name][0]: value for name, value in chosen.items() if value is not None}
                overrides |= _parse_sets(sets)
                settings = _load(config, workdir, overrides, debug, pinned)
                click.get_current_context().meta[cli_kubeflow.SOURCES] = config, overrides
                result = function(settings, **options)
            text, code = result.pop("_text", None), result.pop("_exit", 0)
            click.echo(json.dumps(result, ensure_ascii=False) if as_json else text or json.dumps(result, indent=2))
            sys.exit(code)

        command: Any = invoke
        for name in reversed(setting_options):
            _, kind, text = _SETTING_OPTIONS[name]
            name_ = name.replace("-", "_")
            command = click.option(f"--{_FLAGS.get(name, name)}", name_, type=kind, default=None, help=text)(command)
        for option in reversed(_SHARED):
            command = option(command)
        name = function.__name__.rstrip("_")
        return parent.group(name=name, invoke_without_command=True)(command) if group else parent.command(name)(command)

    return decorate


_SHARED = (
    click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings."),
    click.option(
        "--workdir", type=click.Path(path_type=Path), default=None, help="Folder for everything made.  [default: work]"
    ),
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any setting by its dotted name; repeatable, and stronger than the options.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output."),
    click.option("--debug", is_flag=True, help="Tracebacks, and the libraries' own logs."),
)
_TEACHER = (
    *("teacher", "revision", "prompts", "strategy", "num-steps", "guidance-min", "guidance-max", "trajectories"),
    "storage",
)
_TARGETS = (*_TEACHER, "target-batch-size", "workers", "device")
_TRAIN = ("fusion", "student-steps", "steps", "batch-size", "learning-rate", "processes")
_EVALUATE = ("guidance-scale", "scorer")
_REGISTRY = ("model-name", "tracking-uri")


@_command(*_TEACHER, *_TRAIN, *_EVALUATE, *_REGISTRY, "device")
def run(settings: Settings) -> dict[str, Any]:
    """Run the whole pipeline on this machine: prompts in, registered student out."""
    from teefusion.pipelines.local import run as run_pipeline
    from teefusion.stages.summary import summary_text

    summary: dict[str, Any] = run_pipeline(settings)
    return summary | {"_text": summary_text(summary)}


@_command("prompts")
def ingest(settings: Settings) -> dict[str, Any]:
    """Read, normalise, deduplicate and split prompts."""
    from teefusion.stages.ingest import ingest as stage

    return _shown(stage(settings))


@_command(*_TARGETS, group=True, pinned=False)
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


@_command(*_TARGETS, parent=targets)
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


@_command(*_TEACHER, *_TRAIN, "tracking-uri", "device", pinned=False)
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


@_command(*_TEACHER, *_TRAIN, *_EVALUATE, "device")
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


@_command("prompts", *_EVALUATE, "tracking-uri", "device")
@click.argument("models", nargs=-1, required=True)
def compare(settings: Settings, models: tuple[str, ...]) -> dict[str, Any]:
    """Compare any two or more MODELS on held-out prompts: the evaluation's report, and no verdict.

    Each is a student folder, a teacher (preset, diffusers folder or hub id), or a registered version:
    models:/NAME/VERSION or models:/NAME@ALIAS. The first is what the others are held against.
    """
    from teefusion.compare import compare as run_comparison
    from teefusion.compare import table

    result = run_comparison(settings, models)
    return result | {"_text": table(result)}


@_command(*_TEACHER, *_TRAIN, *_EVALUATE, *_REGISTRY, "device")
def register(settings: Settings) -> dict[str, Any]:
    """Register the student in MLflow as challenger, if its gate passed."""
    from teefusion.stages.evaluate import evaluation_folder
    from teefusion.stages.register import register as stage

    prompts = _prompts(settings)
    student = _student(settings, prompts)
    return _shown(stage(settings, student, evaluation_folder(settings, prompts, student)))


@_command("device", pinned=False)
@click.argument("student", type=click.Path(path_type=Path))
@click.option("--prompt", "texts", multiple=True, required=True, help="What to draw; repeatable.")
@click.option("--guidance-scale", type=float, default=4.0, show_default=True, help="diffusers' s.")
@click.option("--num-steps", type=click.IntRange(1, 1000), help="Sampler steps.  [default: the student's own, else 20]")
@click.option("--images", type=click.IntRange(1, 64), default=1, show_default=True, help="Pictures a prompt.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("pictures"), show_default=True, help="Folder.")
def generate(
    settings: Settings,
    student: Path,
    texts: tuple[str, ...],
    guidance_scale: float,
    num_steps: int | None,
    images: int,
    seed: int,
    output: Path,
) -> dict[str, Any]:
    """Make pictures with the STUDENT in a folder."""
    from teefusion.generation import generate as make

    paths = make(
        student,
        list(texts),
        guidance_scale=guidance_scale,
        num_steps=num_steps,
        images=images,
        seed=seed,
        output=output,
        device=settings.device,
    )
    return {"images": [str(path) for path in paths], "_text": "\n".join(str(path) for path in paths)}


@_command("host", "port", *_REGISTRY, "device", pinned=False)
@click.argument("model", required=False)
def serve(settings: Settings, model: str | None) -> dict[str, Any]:
    """Make pictures over HTTP with MODEL, until SIGTERM.

    MODEL is models:/NAME@alias (followed when it moves), models:/NAME/VERSION, a student folder or a hub id; without
    one, the champion of these settings.
    """
    from teefusion.serving.server import Server

    uri = model or f"models:/{settings.model_name}@champion"
    Server(uri, settings).run()
    return {"model": uri, "_text": "stopped"}


@_command(*_TEACHER, *_TRAIN, *_EVALUATE, *_REGISTRY, "device", pinned=False)
def preflight(settings: Settings) -> dict[str, Any]:
    """Check all that a run would need, here, and say at once everything that is wrong."""
    from teefusion.preflight import preflight as check
    from teefusion.preflight import require_ready

    _, findings = check(settings)
    require_ready(findings)
    found = {finding.check: finding.text for finding in findings}
    return found | {"_text": "\n".join(f"{name:20} {text}" for name, text in found.items())}


@_command(*_TEACHER, *_TRAIN, *_EVALUATE, *_REGISTRY, "device", pinned=False)
@click.option(
    "--output", type=click.Path(path_type=Path), default=Path("pipeline.yaml"), show_default=True, help="File to write."
)
@click.option("--kubernetes-manifests", is_flag=True, help="As resources Pipeline and PipelineVersion, not as IR YAML.")
def compile_(settings: Settings, output: Path, kubernetes_manifests: bool) -> dict[str, Any]:
    """Compile the pipeline to KFP IR YAML, with these settings as the defaults of its parameters."""
    from teefusion.pipelines.compile import compile_pipeline

    version = compile_pipeline(settings, output, kubernetes=kubernetes_manifests)
    return {"output": str(output), "version": version, "_text": str(output)}


cli_kubeflow.add_to(_command, (*_TEACHER, *_TRAIN, *_EVALUATE, *_REGISTRY, "device"))


for _function in COMMANDS:
    _command("tracking-uri", pinned=False)(_function)


def main() -> None:
    """Entry of the console script."""
    cli()


class _report_errors:  # noqa: N801  # a context manager that reads as a verb
    """Errors of ours end in one message and their exit code; anything else is said to be a defect."""

    def __init__(self, debug: bool) -> None:
        self._debug = debug

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or self._debug or isinstance(error, click.ClickException | click.exceptions.Exit | SystemExit):
            return
        if isinstance(error, TeEFusionError):
            click.echo(f"teefusion: {error}", err=True)
            sys.exit(error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            click.echo("\nteefusion: interrupted; run the same command again to continue.", err=True)
            sys.exit(130)
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("teefusion"):
            click.echo(
                f"teefusion: {error}. Install the extras: pip install 'teefusion[pipeline,train,serve]'.", err=True
            )
            sys.exit(UsageError.exit_code)
        if isinstance(error, Exception):
            click.echo(
                f"teefusion: unexpected {type(error).__name__}: {error}. Run with --debug for the trace.", err=True
            )
            sys.exit(1)


def _load(config: Path | None, workdir: Path | None, overrides: dict[str, Any], debug: bool, pinned: bool) -> Settings:
    from teefusion.logs import setup_logging
    from teefusion.settings import load_settings
    from teefusion.sources import pin

    setup_logging(verbose=debug)
    if workdir is not None:
        overrides["workdir"] = workdir
    settings = load_settings(config=config, overrides=overrides)
    return pin(settings) if pinned else settings


def _parse_sets(sets: tuple[str, ...]) -> dict[str, Any]:
    """``key=value`` pairs; values are YAML, so numbers, booleans, lists and null are what they look like."""
    import yaml

    parsed: dict[str, Any] = {}
    for item in sets:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise SettingsError(f"--set takes KEY=VALUE, as in --set train.steps=500; got {item!r}.")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"--set {key}: the value {value!r} is not valid YAML: {error}") from error
    return parsed


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


if __name__ == "__main__":
    main()
