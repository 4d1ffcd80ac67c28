"""KFP component: the exit handler's task; writes the summary, of failed runs too."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def summarize(settings: str, status: dsl.PipelineTaskFinalStatus) -> None:
    """Write summary.json and report.html in the workdir, and close the MLflow run."""
    from teefusion.components.runtime import run_summary

    failed = status.state != "SUCCEEDED"
    run_summary(settings, error=(status.error_message or f"the pipeline ended {status.state}") if failed else None)
