"""Jobs on an API server that breaks off, is away, forgets or refuses: what is told, and what to do."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from teefusion.cluster import Cluster
from teefusion.errors import ClusterError, TrainingError
from tests.apiserver import ApiServer
from tests.jobs.plays import JOBS, WATCH, completes, fails, run, settings, shown, until


@pytest.mark.parametrize("fate", ["gone", "refused", "drop"])
def test_watches_that_break_off_are_taken_up_again(
    server: ApiServer, fate: str, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    def play(api: ApiServer, name: str) -> None:
        until(lambda: not api.watch_fates)
        completes(api, name)

    monkeypatch.setattr("teefusion.jobs._SHORTEST_WATCH_S", 0.05)
    server.watch_fates, server.plays = [fate] * 3, [play]
    run(server, poll_s=5)
    assert shown(messages) == ["step 1", "step 2", "saved"]


def test_the_end_is_learned_from_the_watch_and_not_at_the_next_look(server: ApiServer) -> None:
    began, server.plays = time.monotonic(), [completes]
    run(server, poll_s=60)
    assert time.monotonic() - began < 30
    assert server.count("GET", WATCH) == 1


def test_an_api_that_is_away_for_a_while_is_waited_for(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teefusion.cluster._FIRST_PAUSE_S", 0.02)

    def play(api: ApiServer, name: str) -> None:
        api.busy = 4
        completes(api, name)

    server.busy, server.plays = 3, [play]
    run(server)
    assert server.busy == 0  # every refusal was met


def test_an_api_that_stays_away_is_an_error_that_leaves_the_job(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teefusion.cluster._FIRST_PAUSE_S", 0.02)

    def play(api: ApiServer, name: str) -> None:
        api.busy = 10_000

    server.plays = [play]
    with pytest.raises(ClusterError, match="does not answer .*apiserver is starting.*running again joins it"):
        run(server, patience_s=0.3)
    assert server.jobs


@pytest.mark.parametrize("verb", ["create", "list"])
def test_a_forbidden_call_names_the_role_that_is_missing(server: ApiServer, verb: str) -> None:
    server.forbidden = {(verb, "trainjobs")}
    server.plays = [completes]
    with pytest.raises(ClusterError) as caught:
        run(server)
    told = str(caught.value)
    assert f'pipeline-runner" cannot {verb} resource "trainjobs"' in told
    assert "Bind a Role with trainjobs (trainer.kubeflow.org: create, get, list, watch, delete)" in told
    assert "RoleBinding in this namespace" in told


@pytest.mark.parametrize(
    ("right", "lost"),
    [
        (("list", "events"), "going on without the job's events"),
        (("list", "pods"), "going on without the job's pods"),
        (("get", "pods/log"), "its Role lacks pods/log"),
    ],
)
def test_what_is_only_told_may_be_forbidden(
    server: ApiServer, right: tuple[str, str], lost: str, messages: pytest.LogCaptureFixture
) -> None:
    server.forbidden, server.plays = {right}, [completes]
    run(server)
    assert messages.text.count(lost) == 1


def test_a_failure_whose_pods_may_not_be_read_is_still_told(server: ApiServer) -> None:
    server.forbidden, server.plays = {("list", "pods")}, [fails]
    with pytest.raises(TrainingError, match=r"failed \(FailedJobs.*Its pods cannot be read.*pods/log"):
        run(server)


def test_a_refusal_that_is_no_right_is_told_as_it_is(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    denied = 'admission webhook "validator.trainjob.trainer.kubeflow.org" denied the request: must not have envs'
    monkeypatch.setattr(server, "create", lambda job: (403, {"kind": "Status", "message": denied}))
    with pytest.raises(ClusterError, match=r"must not have envs. Correct the cluster\.\* settings") as caught:
        run(server)
    assert "RoleBinding" not in str(caught.value)


def test_a_missing_runtime_is_named(server: ApiServer) -> None:
    with pytest.raises(ClusterError, match="There is no TrainingRuntime 'other' in namespace team. Install the chart"):
        run(server, runtime="other")
    with pytest.raises(ClusterError, match="There is no ClusterTrainingRuntime 'other' in this cluster"):
        run(server, runtime="other", runtime_kind="ClusterTrainingRuntime")
    assert server.count("POST", "") == 0


def test_a_cluster_without_trainer_is_named(server: ApiServer) -> None:
    server.installed = False
    with pytest.raises(ClusterError, match="has no TrainJobs .* Install Kubeflow Trainer"):
        run(server)


def test_a_cluster_runtime_that_may_not_be_read_is_left_to_the_creation(server: ApiServer) -> None:
    server.forbidden, server.plays = {("get", "clustertrainingruntimes")}, [completes]
    run(server, runtime_kind="ClusterTrainingRuntime")
    assert server.count("POST", JOBS) == 1


def test_no_way_to_a_cluster_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="There is no way to a cluster: .* set KUBECONFIG"):
        Cluster(settings().cluster)
