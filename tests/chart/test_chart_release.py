"""A release's life, by Helm 4 on a double of the Kubernetes API."""

from __future__ import annotations

import json

from tests.charts import FILES, NAMESPACE, RELEASE, chart, merged
from tests.helm_cluster import HelmCluster


def test_a_release_is_installed_upgraded_tested_rolled_back_and_removed() -> None:
    values = FILES["dev"]
    changed = merged(values, {"settings": {"values": {"train": {"steps": 7}}}, "image": {"tag": "0.2.0"}})
    with HelmCluster(NAMESPACE) as cluster:
        helm = cluster.helm
        assert helm.install(chart(), RELEASE, values)["status"] == "deployed"
        # What is `auto` follows the APIs that are there.
        assert cluster.names("TrainingRuntime") == {"teefusion-torch"}
        assert cluster.names("ServiceMonitor") == {"teefusion-mlflow", "teefusion-serve"}
        secrets = {name: cluster.secret(name) for name in cluster.names("Secret")}
        assert len(secrets) == 4
        (job,) = cluster.names("Job")  # hooks are gone
        installed = json.dumps(cluster.things["Deployment", "teefusion-serve"]["spec"])

        assert helm.upgrade(chart(), RELEASE, changed)["status"] == "deployed"
        assert {name: cluster.secret(name) for name in cluster.names("Secret")} == secrets
        assert cluster.things["ConfigMap", "teefusion-settings"]["data"]["TEEFUSION_TRAIN__STEPS"] == "7"
        assert json.dumps(cluster.things["Deployment", "teefusion-serve"]["spec"]) != installed
        (other,) = cluster.names("Job")
        assert other != job  # its template cannot change
        helm.test(RELEASE)
        assert len(cluster.names("Pod")) == 4  # they stay, done, for `--logs`
        helm.rollback(RELEASE)
        assert "TEEFUSION_TRAIN__STEPS" not in cluster.things["ConfigMap", "teefusion-settings"]["data"]
        assert json.dumps(cluster.things["Deployment", "teefusion-serve"]["spec"]) == installed
        assert cluster.names("Job") == {job}

        helm.uninstall(RELEASE)
        assert {kind for kind, _ in cluster.things} == {"Secret", "PersistentVolumeClaim", "Pod"}
        assert helm.install(chart(), RELEASE, values)["status"] == "deployed"
        assert {name: cluster.secret(name) for name in cluster.names("Secret")} == secrets


def test_notes_name_the_secrets_and_claims_that_are_not_there() -> None:
    with HelmCluster(NAMESPACE) as cluster:
        for kind, name in (("ServiceAccount", "default"), ("Secret", "teefusion-s3")):
            cluster.things[kind, name] = {"apiVersion": "v1", "kind": kind, "metadata": {"name": name}}
        notes = cluster.helm.install(chart(), RELEASE, FILES["minimal"])["notes"]
    assert "MISSING: Secret teefusion-mlflow, which the values name." in notes
    assert "MISSING: PersistentVolumeClaim teefusion-work, which the values name." in notes
    assert "Secret teefusion-s3" not in notes
