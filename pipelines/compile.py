"""Compile the pipeline: KFP IR YAML, or the Kubernetes resources that carry it."""

import hashlib
import itertools
import tempfile
from pathlib import Path
from typing import Any

import yaml
from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from teefusion.files import canonical_json, write_bytes
from teefusion.parameters import arguments_of, on_cluster
from teefusion.pipelines.distill import make_pipeline
from teefusion.settings import Settings


def compile_pipeline(settings: Settings, output: Path, *, kubernetes: bool = False) -> str:
    """Write the pipeline whose default arguments are the given settings; returns its version's name.

    With ``kubernetes`` it is written as the resources Pipeline and PipelineVersion. Raises SettingsError for a path
    that is not on the cluster, StorageError.
    """
    text = pipeline_yaml(settings)
    version = version_of(text)
    if kubernetes:
        name = settings.kfp.pipeline
        text = _compiled(
            settings,
            kubernetes_manifest_format=True,
            kubernetes_manifest_options=KubernetesManifestOptions(
                pipeline_name=name,
                pipeline_version_name=f"{name}-{version}",
                namespace=settings.kfp.namespace,
                include_pipeline_manifest=True,
            ),
        )
    write_bytes(output, text.encode())
    return version


def pipeline_yaml(settings: Settings) -> str:
    """IR YAML; the same settings give the same text."""
    return _compiled(settings)


def version_of(text: str) -> str:
    """Name of a pipeline's version: a digest of all but the defaults of its parameters, as runs bring their own."""
    documents: list[dict[str, Any]] = list(yaml.safe_load_all(text))
    for parameter in documents[0]["root"]["inputDefinitions"]["parameters"].values():
        parameter.pop("defaultValue", None)
        parameter.pop("isOptional", None)
    return hashlib.sha256(canonical_json(documents).encode()).hexdigest()[:12]


def _compiled(settings: Settings, **options: Any) -> str:
    settings = on_cluster(settings)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        arguments = arguments_of(settings)
        compiler.Compiler().compile(make_pipeline(settings), str(file), pipeline_parameters=arguments, **options)
        # kfp describes the parameters in comments on top, with sections in another order every time.
        lines = file.read_text().splitlines(keepends=True)
        return "".join(itertools.dropwhile(lambda line: line.startswith("#"), lines))
