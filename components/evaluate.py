"""KFP component: compare student and teacher, and let the gate decide."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def evaluate(
    settings: str,
    prompts: str,
    student: str,
    evaluation: dsl.OutputPath(str),  # type: ignore[valid-type]
    report: dsl.Output[dsl.HTML],
) -> bool:
    """Score both, decide, write the report; returns the verdict, and the folder of the evaluation."""
    import shutil
    from pathlib import Path

    from teefusion.components.runtime import run_stage

    result = run_stage("evaluate", settings, prompts=prompts, student=student)
    Path(evaluation).parent.mkdir(parents=True, exist_ok=True)
    Path(evaluation).write_text(str(result.output))
    shutil.copyfile(Path(result.output) / "report.html", report.path)
    return bool(result.details["gate"]["passed"])
