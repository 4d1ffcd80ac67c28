"""Dashboards and alerts, and the metrics that they ask for."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.charts import CHART, Release


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


_MLFLOW = """
from flask import Flask
from mlflow.server.prometheus_exporter import activate_prometheus_exporter

app = Flask(__name__)
activate_prometheus_exporter(app)
app.add_url_rule("/any", view_func=lambda: "answer")
client = app.test_client()
client.get("/any")
print(client.get("/metrics").text)
"""


def test_dashboards_and_alerts_name_what_mlflow_exports(tmp_path: Path) -> None:
    # In a process of its own: the variables decide for good how prometheus_client counts.
    folder = {name: str(tmp_path) for name in ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")}
    command = [sys.executable, "-c", _MLFLOW]
    done = subprocess.run(command, env=os.environ | folder, capture_output=True, text=True, timeout=200, check=True)
    asked = _queries("mlflow")
    assert {"mlflow_http_request_total", "mlflow_http_request_duration_seconds_bucket"} <= asked
    assert asked <= _exported(done.stdout)


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
