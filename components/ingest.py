"""KFP component: prompts in, content-addressed prompt set out."""

from kfp import dsl

from teefusion.components.image import RUNTIME_IMAGE


@dsl.component(base_image=RUNTIME_IMAGE, install_kfp_package=False)
def ingest(settings: str, record: dsl.Output[dsl.Markdown]) -> str:
    """Make the prompt set; returns its folder."""
    from teefusion.components.runtime import run_stage, write_record

    result = run_stage("ingest", settings)
    write_record(result, record.path)
    return str(result.output)
