"""KFP component: compare student and teacher, and let the gate decide."""

from typing import NamedTuple

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def evaluate(settings: dict, prompts: str, student: str, report: dsl.Output[dsl.HTML]) -> NamedTuple(
    "Evaluation", [("passed", bool), ("evaluation", str)]
):  # type: ignore[valid-type]
    """Score both, decide, write the report; returns the verdict and the evaluation's folder."""
    import shutil
    from typing import NamedTuple

    from teefusion.components.runtime import run_stage

    result = run_stage("evaluate", settings, prompts=prompts, student=student)
    shutil.copyfile(result.output / "report.html", report.path)
    evaluation = NamedTuple("Evaluation", [("passed", bool), ("evaluation", str)])  # noqa: UP014  # kfp's own form
    return evaluation(passed=result.details["gate"]["passed"], evaluation=str(result.output))
