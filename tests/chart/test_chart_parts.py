"""Parts of a release that refer to each other: labels, ports, Secrets, files, volumes."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from tests.charts import CHART, FILES, NAMESPACE, RELEASE, Release, merged, render, values_of

# Secrets and claims that a person makes, as the values files and docs/install.md say.
MADE_BEFORE = {
    "Secret": {"teefusion-s3", "teefusion-mlflow", "teefusion-hub", "teefusion-database", "teefusion-api-key"}
    | {"registry", "database", "teefusion-mlflow-tls", "teefusion-serve-tls"},
    "PersistentVolumeClaim": {"teefusion-work"},
    "ServiceAccount": {"pipeline-runner"},
}


def test_names_are_unique(release: Release) -> None:
    names = [(thing["kind"], thing["metadata"]["name"]) for thing in release.objects]
    assert len(names) == len(set(names))


def test_names_are_short_enough_of_the_longest_release() -> None:
    long = render(FILES["production"], name="a-release-whose-name-is-as-long-as-helm-lets-it-be-53")
    for thing in long.objects:
        assert len(thing["metadata"]["name"]) <= (52 if thing["kind"] == "CronJob" else 63)


def test_labels_take_the_version_of_a_build(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / "teefusion")
    metadata = values_of(CHART / "Chart.yaml")
    built = {"version": f"1.0.0-{'a' * 60}+build.1", "appVersion": f"1.0.0+{'b' * 56}-{'c' * 9}"}
    (tmp_path / "teefusion" / "Chart.yaml").write_text(yaml.safe_dump(metadata | built))
    for thing in render({"image": {"tag": "1.0.0"}}, path=tmp_path / "teefusion").objects:
        for value in thing["metadata"]["labels"].values():
            assert re.fullmatch(r"[A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?", value, flags=re.ASCII), value


def test_names_that_yaml_reads_as_numbers_stay_names() -> None:
    odd = "0777777"  # to YAML 262143
    named, kept = {"name": odd}, {"storage": {"className": odd}}
    outside = {
        "s3": {"existingSecret": odd, "region": odd},
        "mlflow": {"auth": {"existingSecret": odd}, "database": {"existingSecret": odd, "key": odd}},
        "workspace": {"existingClaim": odd},
        "postgresql": {"enabled": False},
        "seaweedfs": {"enabled": False},
    }
    values = {
        "nameOverride": odd,
        "fullnameOverride": "team",
        "settings": named,
        "imagePullSecrets": [named],
        "hub": {"existingSecret": odd},
        "mlflow": {
            "extraEnv": {"NO": odd},
            "ingress": {"enabled": True, "host": odd, "className": odd, "tls": {"secretName": odd}},
        },
        "runner": {"serviceAccount": named, "rbac": {"alsoFor": [odd], "alsoRoles": [{"kind": "Role", "name": odd}]}},
        "training": {
            "runtime": {"name": odd, "enabled": True},
            "serviceAccount": named,
            "queue": {"enabled": True, "name": odd, "clusterQueue": odd},
        },
        "pipelines": {"publish": {"enabled": True}, "token": {"enabled": True, "audience": odd}},
        "workspace": kept,
        "postgresql": kept,
        "seaweedfs": kept,
        "monitoring": {"enabled": True},
    }
    for part in (values, merged(values, outside)):
        text = json.dumps(render(part, name=odd, namespace=odd).objects)
        assert odd in text
        assert "262143" not in text
        assert '"name": false' not in text


def test_values_that_yaml_reads_otherwise_reach_what_they_are_for() -> None:
    labels = {"dashboards": {"labels": {"grafana_dashboard": None}}}
    release = render({"mlflow": {"ingress": {"enabled": True, "host": "*.example.com"}}, "monitoring": labels})
    assert release.one("Ingress", "teefusion-mlflow")["spec"]["rules"][0]["host"] == "*.example.com"
    assert "grafana_dashboard" not in release.one("ConfigMap", "teefusion-dashboards")["metadata"]["labels"]


def test_a_binding_to_another_kind_of_role_is_another_binding() -> None:
    roles = [{"kind": kind, "name": "pipeline-runner"} for kind in ("Role", "ClusterRole")]  # a roleRef is immutable
    bound = render({"runner": {"rbac": {"alsoRoles": roles}}}).of("RoleBinding")
    assert len({binding["metadata"]["name"] for binding in bound}) == 3
    release = render({"runner": {"rbac": {"create": False, "alsoRoles": roles}}})
    assert [binding["roleRef"]["kind"] for binding in release.of("RoleBinding")] == ["Role", "ClusterRole"]
    assert release.of("Role") == []


def test_a_rollout_may_take_as_long_as_a_start() -> None:
    values = {"enabled": True, "model": "models:/teefusion-shapes@champion", "startupSeconds": 3600}
    deployment = render({"serve": values}).one("Deployment", "teefusion-serve")
    probe = deployment["spec"]["template"]["spec"]["containers"][0]["startupProbe"]
    assert deployment["spec"]["progressDeadlineSeconds"] > probe["failureThreshold"] * probe["periodSeconds"] == 3600


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
        yield from pod.sources
        for volume in pod.spec.get("volumes", []):
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


def test_hooks_wait_for_no_claim(release: Release) -> None:
    hooks = [
        f"{thing['kind']}/{thing['metadata']['name']}"
        for thing in release.objects
        if "helm.sh/hook" in thing["metadata"].get("annotations", {})
    ]
    for owner in hooks:  # one that is not bound would fail the install
        assert not any("persistentVolumeClaim" in volume for volume in release.pod(owner).spec["volumes"]), owner


def test_mounts_and_volumes_belong_together(release: Release) -> None:
    for pod in release.pods:
        claims = {"data"} if pod.owner.startswith("StatefulSet/") else set()
        volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | claims
        mounted = {mount["name"] for container in pod.containers for mount in container.get("volumeMounts", [])}
        assert mounted == volumes, pod.owner
