"""KFP component: what would stop the run later, found before anything is spent."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def preflight(
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
    findings: dsl.Output[dsl.Markdown],
) -> str:
    """Check all that a run needs; returns its settings, pinned, for the steps that follow."""
    arguments = dict(locals())
    from teefusion.components.runtime import run_preflight

    return run_preflight(arguments, arguments.pop("findings").path)
