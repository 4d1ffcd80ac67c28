"""Which values the chart takes, what it says of bad ones, and what it tells of itself."""

from __future__ import annotations

import importlib.util
import json
import re
import tomllib

import helm_python
import pytest

from tests.charts import CHART, FILES, Json, chart, notes, render, values_of

ROOT = CHART.parents[1]

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
    ({"nameOverride": "a" * 64}, "nameOverride"),
    ({"training": {"queue": {"name": "q" * 64}}}, "name"),
    ({"mlflow": {"ingress": {"host": "MLflow.example.com"}}}, "host"),
    ({"serve": {"ingress": {"host": "*"}}}, "host"),
    ({"settings": {"values": {"Train": {"steps": 3}}}}, "Train"),
    ({"settings": {"values": {"teacher": "sd3-medium"}}}, "teacher"),
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
    ({"networkPolicy": {"outside": {"database": {"ports": []}}}}, "ports"),
    ({"imagePullSecrets": ["registry"]}, "imagePullSecrets"),
    ({"commonLabels": {"app.kubernetes.io/name": "mine"}}, "commonLabels"),
    ({"serve": {"podLabels": {"team": "not a label"}}}, "team"),
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
    ({"settings": {"env": {"TEEFUSION_DEVICE": "cpu"}}}, "settings.env.TEEFUSION_DEVICE"),
    ({"settings": {"env": {"HF_TOKEN": "x"}}}, "secrets into a Secret"),
    ({"training": {"queue": {"enabled": True}}}, "training.queue.clusterQueue"),
    ({"pipelines": {"resubmit": {"enabled": True}}}, "list the teachers"),
    (
        {"serve": {"enabled": True, "model": "models:/x@y", "autoscaling": {"enabled": True, "minReplicas": 9}}},
        "minReplicas",
    ),
    ({"serve": {"rollout": {"maxSurge": "0%", "maxUnavailable": 0}}}, "both 0"),
    ({"fullnameOverride": "1st.team"}, "set fullnameOverride"),
]


@pytest.mark.parametrize(("values", "told"), INCOMPLETE, ids=[told for _, told in INCOMPLETE])
def test_values_that_do_not_fit_together_are_refused_in_words(values: Json, told: str) -> None:
    with pytest.raises(helm_python.HelmError, match=re.escape(told)):
        render(values)


def test_further_objects_know_the_release() -> None:
    text = "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: '{{ .Release.Name }}-more'\n"
    same = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-again"}}
    assert {"teefusion-more", "teefusion-again"} <= render({"extraObjects": [text, same]}).names("ConfigMap")


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
