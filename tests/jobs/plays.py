"""Jobs for the API server's double: settings, manifests, how they play out, and what was told."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from teefusion.cluster import Cluster
from teefusion.jobs import run_job
from teefusion.settings import Settings, load_settings
from teefusion.trainjobs import Work, build_trainjob
from tests.apiserver import NAMESPACE, ApiServer

JOBS = r"/trainjobs(\?|$)"
WATCH = "watch=True"


def settings(**cluster: Any) -> Settings:
    quick = {"namespace": NAMESPACE, "nodes": 2, "poll_s": 0.1, "patience_s": 5, "request_timeout_s": 3}
    shared = {"volume_claim": "claim", "volume_path": "/shared"}
    chosen = {f"cluster.{name}": value for name, value in (quick | shared | cluster).items()}
    return load_settings(overrides={"workdir": Path("/shared/work"), **chosen})


def manifest(chosen: Settings, output: str = "/shared/out", **more: Any) -> dict[str, Any]:
    work = Work("train", "teefusion.training", {"prompts": "/shared/p", "targets": "s3://b/t", "output": output})
    return build_trainjob(chosen, work, namespace=NAMESPACE, **more)


def cluster(server: ApiServer, chosen: Settings) -> Cluster:
    configuration = client.Configuration(host=server.url)
    configuration.retries = False
    return Cluster(chosen.cluster, api=client.ApiClient(configuration))


def run(server: ApiServer, **options: Any) -> str:
    """Name of the job that was run to its end."""
    chosen = settings(**options)
    wanted = manifest(chosen)
    run_job(cluster(server, chosen), wanted)
    return str(wanted["metadata"]["name"])


def completes(server: ApiServer, name: str) -> None:
    """The play of a job that goes well."""
    server.start(name, nodes=2)
    server.say(f"{name}-node-0-0-a", "step 1", "step 2")
    server.say(f"{name}-node-0-1-a", "of the second node")
    time.sleep(0.2)
    server.say(f"{name}-node-0-0-a", "saved")
    for node in (0, 1):
        server.end(f"{name}-node-0-{node}-a")
    server.condition(name, "Complete", "AllJobsCompleted", "jobset completed successfully")


def fails(server: ApiServer, name: str) -> None:
    """The play of a job whose second node runs out of memory, and brings the first down."""
    server.start(name, nodes=2)
    server.say(f"{name}-node-0-0-a", "peer closed the connection")
    server.say(f"{name}-node-0-1-a", *[f"line {k}" for k in range(40)], "out of memory")
    server.end(f"{name}-node-0-0-a", code=1, reason="Error", at="2026-01-01T00:02:00Z")
    server.end(f"{name}-node-0-1-a", code=137, reason="OOMKilled", at="2026-01-01T00:01:00Z")
    server.condition(name, "Failed", "FailedJobs", "jobset failed due to one or more job failures")


def shown(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Lines of the job's log, in ours."""
    return [message.removeprefix("| ") for message in caplog.messages if message.startswith("| ")]


def until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)
