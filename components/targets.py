"""KFP component: the teacher's trajectories, stored."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def targets(settings: str, prompts: str, record: dsl.Output[dsl.Markdown]) -> str:
    """Make the target set of a prompt set; returns its folder."""
    from teefusion.components.runtime import run_stage, write_record

    result = run_stage("targets", settings, prompts=prompts)
    write_record(result, record.path)
    return str(result.output)
