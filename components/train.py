"""KFP component: distil a student."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def train(settings: str, prompts: str, targets: str) -> str:
    """Train on a target set; returns the student's folder."""
    from teefusion.components.runtime import run_stage

    return str(run_stage("train", settings, prompts=prompts, targets=targets).details["student"])
