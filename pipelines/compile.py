"""Compile the pipeline to KFP IR YAML."""

import tempfile
from pathlib import Path

from kfp import compiler

from teefusion.files import write_bytes
from teefusion.pipelines.distill import distill
from teefusion.settings import Settings


def compile_pipeline(settings: Settings, output: Path) -> None:
    """Write IR YAML whose default parameters are the given settings. Raises StorageError."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(distill, str(file), pipeline_parameters={"settings": settings.to_json()})
        write_bytes(output, file.read_bytes())
