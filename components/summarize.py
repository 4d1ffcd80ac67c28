"""KFP component: the exit handler's task; tells what became of a run, also of a failed or cancelled one."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def summarize(
    settings: str,
    teacher: str,
    teacher_uri: str,
    teacher_revision: str,
    prompts: str,
    strategy: str,
    guidance_min: float,
    guidance_max: float,
    student: dict,  # type: ignore[type-arg]
    fusion: dict,  # type: ignore[type-arg]
    train_steps: int,
    gate: dict,  # type: ignore[type-arg]
    status: dsl.PipelineTaskFinalStatus,
    record: dsl.Output[dsl.Markdown],
) -> None:
    """Write summary.json and report.html in the workdir, close the MLflow run, delete a TrainJob left at work."""
    arguments = dict(locals())
    from teefusion.components.runtime import run_summary

    status, record = (arguments.pop(name) for name in ("status", "record"))
    run_summary(arguments, record.path, state=status.state, error=status.error_message)
