"""KFP component: a version in the MLflow registry, with the alias challenger."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def register(settings: str, student: str, evaluation: str, record: dsl.Output[dsl.Markdown]) -> str:
    """Register a student whose gate passed; returns `name/version`."""
    from teefusion.components.runtime import run_stage, write_record

    result = run_stage("register", settings, student=student, evaluation=evaluation)
    write_record(result, record.path)
    return f"{result.details['name']}/{result.details['version']}"
