"""What the pipeline reads of a release: settings, Secrets, names, permissions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from teefusion.settings import Settings, load_settings
from teefusion.storage import S3Credentials
from tests.charts import CASES, CHART, FILES, Json, Release, chart, merged, render, values_of


@pytest.mark.parametrize("case", ["defaults", *FILES])
def test_settings_are_those_of_the_values(
    case: str, releases: dict[str, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    release = releases[case]
    for name, value in release.one("ConfigMap", "teefusion-settings")["data"].items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    values = chart().merge_values(CASES[case])
    _assert_holds(settings, values["settings"]["values"])
    inside = values["mlflow"]["enabled"]
    url = "http://teefusion-mlflow.ml.svc:5000" if inside else "https://mlflow.example.com"
    assert settings.mlflow.tracking_uri == url
    assert settings.storage.uri == f"s3://{values['s3']['bucket']}"
    store = "http://teefusion-seaweedfs.ml.svc:8333" if values["seaweedfs"]["enabled"] else None
    assert settings.storage.endpoint_url == store
    assert settings.storage.addressing_style == values["s3"]["addressingStyle"]
    cluster = settings.cluster
    assert (cluster.runtime, cluster.service_account) == ("teefusion-torch", "teefusion-trainer")
    assert (cluster.s3_secret, cluster.mlflow_secret) == ("teefusion-s3", "teefusion-mlflow")
    if values["hub"]["existingSecret"]:
        assert cluster.hub_secret == values["hub"]["existingSecret"]
    assert cluster.queue == ("teefusion" if values["training"]["queue"]["enabled"] else None)
    assert (cluster.volume_claim, str(cluster.volume_path)) == ("teefusion-work", "/shared")
    assert settings.workdir.is_relative_to("/shared")
    assert cluster.variables == {"HF_HOME": "/shared/hub"} | values["settings"]["env"]
    assert values["settings"]["env"].items() <= release.one("ConfigMap", "teefusion-settings")["data"].items()


def _assert_holds(settings: Settings, values: Json) -> None:
    given = settings.model_dump(mode="json")
    for section, inner in values.items():
        for key, value in inner.items() if isinstance(inner, dict) else ():
            found = given[section][key]
            if isinstance(value, list):
                found = [{name: item[name] for name in wanted} for item, wanted in zip(found, value, strict=True)]
            assert found == value, f"{section}.{key}"
        if not isinstance(inner, dict):
            assert given[section] == inner


@pytest.mark.parametrize("user", [None, 2000])
def test_runs_have_the_charts_user(user: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    data = render({"security": {"runAsUser": user}}).one("ConfigMap", "teefusion-settings")["data"]
    for name, value in data.items():
        monkeypatch.setenv(name, value)
    assert load_settings().cluster.run_as_user == user


def test_numbers_reach_the_settings_as_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"train": {"steps": 2000000, "learning_rate": 0.0000005}, "targets": {"trajectories": 10000000}}
    release = render({"settings": {"values": values}})
    for name, value in release.one("ConfigMap", "teefusion-settings")["data"].items():
        monkeypatch.setenv(name, value)
    settings = load_settings()
    assert (settings.train.steps, settings.train.learning_rate) == (2_000_000, 5e-7)
    assert settings.targets.trajectories == 10_000_000


def test_secrets_have_the_names_and_keys_that_the_code_reads(
    releases: dict[str, Release], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = releases["defaults"].one("Secret", "teefusion-s3")["stringData"]
    for name, value in held.items():
        monkeypatch.setenv(name, value)
    read = S3Credentials()
    assert read.access_key_id is not None
    assert read.access_key_id.get_secret_value() == held["TEEFUSION_S3_ACCESS_KEY_ID"]
    assert read.secret_access_key is not None
    assert read.secret_access_key.get_secret_value() == held["TEEFUSION_S3_SECRET_ACCESS_KEY"]
    load_settings()  # no unknown variable among them
    mlflow = releases["defaults"].one("Secret", "teefusion-mlflow")["stringData"]
    assert mlflow.keys() >= {"MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"}
    (identity,) = json.loads(releases["defaults"].one("Secret", "teefusion-seaweedfs")["stringData"]["s3.json"])[
        "identities"
    ]
    assert identity["credentials"] == [
        {"accessKey": held["TEEFUSION_S3_ACCESS_KEY_ID"], "secretKey": held["TEEFUSION_S3_SECRET_ACCESS_KEY"]}
    ]


def test_fixed_names_do_not_depend_on_the_release() -> None:
    other = render({}, name="another")
    assert "teefusion-settings" in other.names("ConfigMap")
    assert {"teefusion-s3", "teefusion-mlflow"} <= other.names("Secret")
    assert {"teefusion-runner", "teefusion-trainer"} <= other.names("ServiceAccount")
    assert {"teefusion-work"} == other.names("PersistentVolumeClaim")
    assert "another-teefusion-mlflow" in other.names("Service")


def test_the_runner_may_no_more_than_it_needs(release: Release) -> None:
    for role in release.of("Role"):
        granted = {(group, resource): set(rule["verbs"]) for rule in role["rules"] for group in rule["apiGroups"]
                   for resource in rule["resources"]}  # fmt: skip
        read = {"get", "list", "watch"}
        assert granted == {
            ("trainer.kubeflow.org", "trainjobs"): {"create", "delete"} | read,
            ("trainer.kubeflow.org", "trainingruntimes"): {"get"},
            ("", "pods"): read,
            ("", "pods/log"): {"get"},
            ("", "events"): read,
        }
    assert not release.of("ClusterRole")
    assert not release.of("ClusterRoleBinding")


def test_a_newer_chart_alone_rolls_nothing(releases: dict[str, Release], tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "teefusion")
    metadata = values_of(CHART / "Chart.yaml")
    (tmp_path / "teefusion" / "Chart.yaml").write_text(yaml.safe_dump(metadata | {"version": "99.0.0"}))
    newer = render(FILES["dev"], path=tmp_path / "teefusion")
    assert [pod for pod in newer.pods if not pod.owner.startswith("Pod/")] == [
        pod for pod in releases["dev"].pods if not pod.owner.startswith("Pod/")
    ]


def test_a_changed_setting_rolls_the_pods_that_read_it_and_no_others() -> None:
    before = render(FILES["dev"])
    after = render(merged(FILES["dev"], {"settings": {"values": {"train": {"steps": 7}}}}))
    changed = {
        pod.owner
        for pod, old in zip(after.pods, before.pods, strict=True)
        if pod.annotations != old.annotations or pod.spec != old.spec
    }
    assert changed == {"Deployment/teefusion-serve"}
