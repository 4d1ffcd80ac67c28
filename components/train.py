"""KFP component: distil a student."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def train(settings: str, prompts: str, targets: str, metrics: dsl.Output[dsl.Metrics]) -> str:
    """Train on a target set; returns the student's folder."""
    from teefusion.components.runtime import run_stage

    details = run_stage("train", settings, prompts=prompts, targets=targets).details
    metrics.log_metric("guidance_residual", details["guidance_residual"])
    return str(details["student"])
