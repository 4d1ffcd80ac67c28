"""KFP component: the teacher's trajectories, stored."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def targets(settings: str, prompts: str) -> str:
    """Make the target set of a prompt set; returns its folder."""
    from teefusion.components.runtime import run_stage

    return str(run_stage("targets", settings, prompts=prompts).output)
