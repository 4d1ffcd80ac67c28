"""KFP component: prompts in, content-addressed prompt set out."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def ingest(settings: str) -> str:
    """Make the prompt set; returns its folder."""
    from teefusion.components.runtime import run_stage

    return str(run_stage("ingest", settings).output)
