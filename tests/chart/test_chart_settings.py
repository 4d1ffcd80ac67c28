"""What the pipeline reads of a release: settings, Secrets, names, permissions."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import helm_python
import pytest
import yaml

from teefusion.settings import SECRET_KEYS, Settings, load_settings
from teefusion.storage import S3Credentials
from tests.charts import (
    CASES,
    CHART,
    FILES,
    Json,
    Pod,
    Release,
    chart,
    leaves,
    merged,
    nested,
    notes,
    render,
    values_of,
    without_generated,
)


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


def _file_for_submitting(release: Release, folder: Path) -> Path:
    """What the first command of the notes writes."""
    file = folder / "cluster.yaml"
    file.write_text(release.one("ConfigMap", "teefusion-submit")["data"]["cluster.yaml"])
    return file


@pytest.mark.parametrize("user", [None, 2000])
def test_runs_have_the_charts_user(user: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    data = render({"security": {"runAsUser": user}}).one("ConfigMap", "teefusion-settings")["data"]
    for name, value in data.items():
        monkeypatch.setenv(name, value)
    assert load_settings().cluster.run_as_user == user


def test_numbers_reach_the_settings_as_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = {"train": {"steps": 2000000, "learning_rate": 0.0000005}, "targets": {"trajectories": 10000000}}
    release = render({"settings": {"values": values}})
    from_file = load_settings(config=_file_for_submitting(release, tmp_path))
    for name, value in release.one("ConfigMap", "teefusion-settings")["data"].items():
        monkeypatch.setenv(name, value)
    for settings in (load_settings(), from_file):
        assert (settings.train.steps, settings.train.learning_rate) == (2_000_000, 5e-7)
        assert settings.targets.trajectories == 10_000_000


@pytest.mark.parametrize("case", ["defaults", *FILES])
def test_the_file_for_submitting_is_what_pods_have_as_variables(
    case: str, releases: dict[str, Release], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = " ".join(notes(CASES[case]).split())
    assert "kubectl get configmap teefusion-submit --namespace ml --output jsonpath='{.data.cluster\\.yaml}'" in told
    from_file = load_settings(config=_file_for_submitting(releases[case], tmp_path))
    for name, value in releases[case].one("ConfigMap", "teefusion-settings")["data"].items():
        if not name.startswith(("HF_", "NCCL_")):
            monkeypatch.setenv(name, value)
    assert from_file == load_settings()
    assert from_file.kfp.namespace == ("ml" if case == "production" else None)


def test_the_notes_command_submits_to_the_images_and_the_volume_of_the_release(tmp_path: Path) -> None:
    values = merged(FILES["dev"], {"image": {"registry": "registry.example.com/team"}})
    values |= {"runner": {"serviceAccount": {"name": "steps"}}, "workspace": {"mountPath": "/team"}}
    _file_for_submitting(render(values), tmp_path)
    (command,) = re.findall(r"^  (teefusion submit .*)$", notes(values), flags=re.MULTILINE)
    variables = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    words = [*command.split(), "--dry-run", "--json"]
    done = subprocess.run(words, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=100, check=True)
    (run,) = json.loads(done.stdout)["runs"]
    assert run["teacher"] == "shapes"
    given = json.loads(run["arguments"]["settings"])
    cluster, volume = given["cluster"], ("teefusion-work", "/team", "/team/work")
    assert cluster["image"] == "registry.example.com/team/teefusion:0.1.0-train"
    assert cluster["small_image"] == "registry.example.com/team/teefusion:0.1.0-pipeline"
    assert (cluster["volume_claim"], cluster["volume_path"], given["workdir"]) == volume
    assert given["kfp"]["service_account"] == "steps"
    assert given["kfp"]["host"] == "http://localhost:8888"


def test_notes_reach_kubeflow_where_it_is() -> None:
    def told(endpoint: str) -> str:
        return notes({"pipelines": {"endpoint": endpoint}})

    forward = "kubectl port-forward --namespace kubeflow service/ml-pipeline 80 &"
    assert forward in told("http://ml-pipeline.kubeflow.svc.cluster.local")
    short = told("http://ml-pipeline.kubeflow:8888/pipeline")
    assert "kubectl port-forward --namespace kubeflow service/ml-pipeline 8888 &" in short
    assert "--endpoint http://localhost:8888/pipeline " in short
    assert "--endpoint http://localhost:8888/path " in told("http://ml-pipeline.kubeflow.svc:8888/path")
    assert "--endpoint https://example.com:8443 " in told("https://example.com:8443")
    outside = told("https://kubeflow.example.com/pipeline")
    assert "service/ml-pipeline" not in outside
    assert "--endpoint https://kubeflow.example.com/pipeline" in outside


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


def test_an_mlflow_elsewhere_may_want_a_token_and_a_store_a_role(releases: dict[str, Release]) -> None:
    pod = releases["minimal"].pod("Pod/teefusion-test-storage")
    given = {one["name"]: one["valueFrom"]["secretKeyRef"] for _, one in pod.variables if "valueFrom" in one}
    assert {name for name, source in given.items() if source["name"] == "teefusion-mlflow" and source["optional"]} == {
        *SECRET_KEYS["mlflow_secret"]
    }
    assert pod.spec["serviceAccountName"] == load_settings().kfp.service_account


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
    old, new = ({pod.owner: pod for pod in release.pods} for release in (before, after))
    assert {owner for owner in new if new[owner] != old[owner]} == {"Deployment/teefusion-serve"}


def test_every_value_that_running_pods_read_of_a_secret_or_config_map_rolls_them() -> None:
    before = _read(render(FILES["dev"]))
    rolled = set()
    for path, value in leaves(merged(values_of(CHART / "values.yaml"), FILES["dev"])):
        try:
            after = _read(render(merged(FILES["dev"], nested(path, _another(value)))))
        except helm_python.HelmError:  # it takes one of a few words, or others beside it
            continue
        for owner, (pod, read) in after.items():
            if owner in before and read != before[owner][1]:
                assert pod != before[owner][0], f"{path} does not roll {owner}"
                rolled.add((path, owner))
    assert {("mlflow.auth.adminUsername", f"Deployment/teefusion-{name}") for name in ("mlflow", "serve")} <= rolled
    assert len(rolled) > 20


def _read(release: Release) -> dict[str, tuple[Pod, Json]]:
    """Pods that run on, by their owner, with what of this release they read by reference, passwords aside."""
    found = {}
    for pod in release.pods:
        if pod.owner.startswith(("Deployment/", "StatefulSet/")):
            read = {}
            for kind, name, key in pod.sources:
                if name in release.names(kind):
                    thing = release.one(kind, name)
                    held = thing.get("stringData", {}) | thing.get("data", {})
                    read[kind, name, key] = without_generated(held[key] if key else held)
            found[pod.owner] = (pod, read)
    return found


def _another(value: Any) -> Any:
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case str():
            return f"{value}1" if value else "a1"
        case _:
            return value
