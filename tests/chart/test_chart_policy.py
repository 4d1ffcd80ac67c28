"""Security of every pod: the restricted standard, tokens, secrets, networks, what stays."""

from __future__ import annotations

import json
import re

from tests.charts import CHART, FILES, Json, Release, leaves, merged, nested, render, values_of


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


def test_every_pod_asks_for_what_the_values_say() -> None:
    paths = [path for path, _ in leaves(values_of(CHART / "values.yaml")) if path.endswith("requests.memory")]
    runtime = {"training": {"runtime": {"enabled": True}}}
    for pod in render(merged(FILES["dev"], runtime, *(nested(path, "7Mi") for path in paths))).pods:
        assert {container["resources"]["requests"]["memory"] for container in pod.containers} == {"7Mi"}, pod.owner


def test_pods_get_no_istio_sidecar(release: Release) -> None:
    # Every profile of Kubeflow would add one. Istio's webhook goes by the pod's label.
    assert {pod.labels["sidecar.istio.io/inject"] for pod in release.pods} <= {"false"}


def test_labels_of_the_values_replace_the_charts() -> None:
    asked = {"commonLabels": {"team": "a"}, "mlflow": {"podLabels": {"team": "b", "sidecar.istio.io/inject": "true"}}}
    labels = render(asked).pod("Deployment/teefusion-mlflow").labels
    assert (labels["team"], labels["sidecar.istio.io/inject"]) == ("b", "true")


def test_servers_have_probes(release: Release) -> None:
    for pod in release.pods:
        if pod.owner.startswith(("Deployment/", "StatefulSet/")):
            (server,) = pod.spec["containers"]
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= server.keys()


def test_a_rollback_waits_for_no_broken_pod(releases: dict[str, Release]) -> None:
    stores = releases["defaults"].of("StatefulSet")
    assert [store["spec"]["podManagementPolicy"] for store in stores] == ["Parallel", "Parallel"]


def test_images_are_pinned(release: Release) -> None:
    for pod in release.pods:
        for container in pod.containers:
            assert re.fullmatch(r"[\w./-]+(:\d+)?[\w./-]*(:[\w.-]+|@sha256:[0-9a-f]{64})", container["image"])
            assert not container["image"].endswith(":latest")
            assert container["imagePullPolicy"] == "IfNotPresent"  # as the values say


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


def test_users_may_have_numbers_as_high_as_openshifts() -> None:
    pod = render({"security": {"runAsUser": 1000650000}}).pod("Deployment/teefusion-mlflow")
    security = pod.spec["securityContext"]
    assert {type(security[name]) for name in ("runAsUser", "runAsGroup", "fsGroup")} == {int}  # not 1.00065e+09


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


def test_variables_of_values_replace_the_charts_whole() -> None:
    key = {"configMapKeyRef": {"name": "mine", "key": "id"}}
    extra = {"HOME": "/elsewhere", "AWS_ACCESS_KEY_ID": key, "POD_IP": key, "TEEFUSION_S3_ACCESS_KEY_ID": key}
    asked = {part: {"extraEnv": extra | {"A_MILLION": 1000000}} for part in ("mlflow", "serve", "pipelines")}
    release = render(merged(FILES["dev"], asked))
    for owner in ("Deployment/teefusion-mlflow", "CronJob/teefusion-mlflow-collect", "Deployment/teefusion-serve",
                  "Job/teefusion-publish", "CronJob/teefusion-resubmit"):  # fmt: skip
        for container in release.pod(owner).containers:
            given = {variable.pop("name"): variable for variable in container["env"]}
            assert all(given[name] == {"valueFrom": key} for name in extra.keys() - {"HOME"}), owner
            assert given["HOME"] == {"value": "/elsewhere"}
            assert given["A_MILLION"] == {"value": "1000000"}


def test_every_pod_has_a_network_policy_of_its_own(releases: dict[str, Release]) -> None:
    for name in ("defaults", "dev", "production"):
        release = releases[name]
        policies = [one["spec"] for one in release.of("NetworkPolicy")]
        (default,) = (one["spec"] for one in release.of("NetworkPolicy") if one["metadata"]["name"].endswith("-deny"))
        assert [port["port"] for rule in default["egress"] for port in rule["ports"]] == [53, 53]
        assert "ingress" not in default
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


def test_policies_let_out_to_the_ports_of_the_urls() -> None:
    inside = {
        "mlflow": {"enabled": False, "externalUrl": "http://mlflow.other.svc:5000"},
        "postgresql": {"enabled": False},
        "seaweedfs": {"enabled": False},
        "s3": {"endpointUrl": "http://minio.store.svc:9000"},
        "pipelines": {"endpoint": "http://ml-pipeline-ui.kubeflow", "publish": {"enabled": True}},
        "serve": {"enabled": True, "model": "models:/teefusion-shapes@champion"},
    }
    assert _let_out(inside, "serve") == [5000, 9000, 443]  # MLflow, S3, hub
    assert _let_out(inside, "publish") == [80, 443]
    elsewhere = {"mlflow": {"externalUrl": "https://mlflow.example.com/ml"}, "s3": {"endpointUrl": ""}}
    mirror = {"settings": {"env": {"HF_ENDPOINT": "https://[fd00::1]:8443/hub"}}}
    assert _let_out(merged(inside, elsewhere, mirror), "serve") == [443, 443, 8443]
    proxies = {"settings": {"env": {"HTTPS_PROXY": "http://proxy.example.com:3128", "http_proxy": "10.0.0.1:8080"}}}
    assert _let_out(merged(inside, proxies), "serve") == [5000, 3128, 8080, 9000, 3128, 8080, 443, 3128, 8080]
    named = {"networkPolicy": {"outside": {"s3": {"ports": [9001, 9002]}}}}
    assert _let_out(merged(inside, named), "serve") == [5000, 9001, 9002, 443]


def _let_out(values: Json, component: str) -> list[int]:
    policy = render(values).one("NetworkPolicy", f"teefusion-{component}")
    return [port["port"] for rule in policy["spec"]["egress"] for port in rule["ports"]]


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


def test_mlflows_ui_may_write_at_every_address_that_answers() -> None:
    def origins(**values: object) -> list[str]:
        (server,) = render({"mlflow": values}).pod("Deployment/teefusion-mlflow").spec["containers"]
        given = [word for word in server["args"] if word.startswith("--cors-allowed-origins=")]
        return [origin for word in given for origin in word.partition("=")[2].split(",")]

    assert origins() == []
    assert origins(allowedHosts=["ml:81"]) == ["http://ml:81", "https://ml:81"]
    ingress = {"enabled": True, "host": "x.example.com", "tls": {"enabled": False}}
    both = origins(allowedHosts=["ml:81"], ingress=ingress)
    assert both == ["http://x.example.com", "https://x.example.com", "http://ml:81", "https://ml:81"]


def test_mlflow_starts_no_job_runner_and_speaks_to_s3_as_the_values_say(releases: dict[str, Release]) -> None:
    for name, style in (("defaults", "path"), ("production", "auto")):
        pod = releases[name].pod("Deployment/teefusion-mlflow")
        given = {variable["name"]: variable.get("value") for _, variable in pod.variables}
        assert given["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
        assert given["MLFLOW_BOTO_CLIENT_ADDRESSING_STYLE"] == style


def test_the_collector_goes_where_the_server_may_not() -> None:
    spread = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"}
    placed = {"affinity": {"podAntiAffinity": {}}, "topologySpreadConstraints": [spread], "nodeSelector": {"a": "b"}}
    release = render({"mlflow": placed})
    assert placed.items() <= release.pod("Deployment/teefusion-mlflow").spec.items()
    collector = release.pod("CronJob/teefusion-mlflow-collect").spec
    assert collector["nodeSelector"] == {"a": "b"}
    assert not {"affinity", "topologySpreadConstraints"} & collector.keys()


def test_data_stay_when_the_release_goes(releases: dict[str, Release]) -> None:
    release = releases["defaults"]
    for thing in [*release.of("PersistentVolumeClaim"), *release.of("Secret")]:
        assert thing["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep", thing["metadata"]["name"]
