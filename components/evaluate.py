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
    verdict: dsl.Output[dsl.Markdown],
    scores: dsl.Output[dsl.Metrics],
) -> bool:
    """Score both, decide, write the report; returns the verdict, and the folder of the evaluation."""
    import shutil
    from pathlib import Path

    from teefusion.components.runtime import run_stage
    from teefusion.stages.summary import scores_of, verdict_markdown

    result = run_stage("evaluate", settings, prompts=prompts, student=student)
    Path(evaluation).parent.mkdir(parents=True, exist_ok=True)
    Path(evaluation).write_text(str(result.output))
    shutil.copyfile(Path(result.output) / "report.html", report.path)
    Path(verdict.path).write_text(verdict_markdown(result.details))
    for name, value in scores_of(result.details).items():
        scores.log_metric(name, value)
    return bool(result.details["gate"]["passed"])
