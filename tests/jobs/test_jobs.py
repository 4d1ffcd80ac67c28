"""One job of a run: made or joined, followed, ended, removed, owned; stopped with the command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from teefusion.errors import ClusterError, TrainingError
from teefusion.jobs import run_job
from teefusion.trainjobs import trainjob_name
from tests.apiserver import ApiServer
from tests.jobs.plays import JOBS, WATCH, cluster, completes, fails, manifest, run, settings, shown, until


def test_a_job_is_made_followed_and_removed_when_complete(
    server: ApiServer, messages: pytest.LogCaptureFixture
) -> None:
    server.plays = [completes]
    name = run(server)
    assert shown(messages) == ["step 1", "step 2", "saved"]
    assert f"TrainJob {name} created in namespace team: 2 nodes x 1 processes" in messages.messages
    assert messages.messages[-1] == f"TrainJob {name} is complete"
    assert server.count("POST", JOBS) == 1
    time.sleep(0.1)
    assert not server.jobs


def test_a_completed_job_stays_where_it_shall(server: ApiServer) -> None:
    server.plays = [completes]
    name = run(server, keep_finished=True)
    assert server.jobs.keys() == {name}
    assert server.count("DELETE", "") == 0


def test_a_failed_job_tells_why_with_the_last_lines_of_the_pod_that_failed_first(server: ApiServer) -> None:
    server.plays = [fails]
    with pytest.raises(TrainingError) as caught:
        run(server)
    told = str(caught.value)
    assert "failed (FailedJobs: jobset failed due to one or more job failures)" in told
    assert "-node-0-1-a ended with exit code 137 (OOMKilled); its last lines:\nline 11\n" in told
    assert "out of memory\nCorrect that and run again" in told
    assert "peer closed" not in told
    assert server.jobs  # left to be looked at


def test_what_torchrun_says_of_its_own_end_hides_no_reason(server: ApiServer) -> None:
    def play(api: ApiServer, name: str) -> None:
        pod = f"{name}-node-0-0-a"
        api.start(name)
        api.say(pod, "the loss is nan", "W0101 torch/distributed/elastic/multiprocessing/api.py:9] Sending SIGTERM")
        api.say(pod, "E0101 torch/distributed/elastic/multiprocessing/api.py:1] failed (exitcode: 1) local_rank: 0")
        api.say(pod, *["Traceback of torchrun"] * 200)
        api.end(pod, code=1)
        api.condition(name, "Failed")

    server.plays = [play]
    with pytest.raises(TrainingError, match="its last lines:\nthe loss is nan\nCorrect that"):
        run(server)


def test_a_failed_job_without_pods_says_so(server: ApiServer) -> None:
    server.plays = [lambda api, name: api.condition(name, "Failed", "DeadlineExceeded", "active longer than 10 s")]
    with pytest.raises(TrainingError, match=r"DeadlineExceeded: active longer.*None of its pods is left"):
        run(server)


def test_an_evicted_pod_is_named_with_its_reason(server: ApiServer) -> None:
    def play(api: ApiServer, name: str) -> None:
        api.start(name)
        with api.change():
            api.pods[f"{name}-node-0-0-a"]["status"] = {
                "phase": "Failed",
                "reason": "Evicted",
                "message": "low on disk",
            }
        api.condition(name, "Failed")

    server.plays = [play]
    with pytest.raises(TrainingError, match=r"failed \(no reason given\).*node-0-0-a failed \(Evicted: low on disk\)"):
        run(server)


def test_a_job_that_someone_deletes_is_an_error(server: ApiServer) -> None:
    def play(api: ApiServer, name: str) -> None:
        api.start(name)
        time.sleep(0.3)
        api.remove(name)

    server.plays = [play]
    with pytest.raises(TrainingError, match="was deleted while it ran. Run again"):
        run(server)


def test_a_second_attempt_joins_the_job_of_the_first(server: ApiServer, messages: pytest.LogCaptureFixture) -> None:
    chosen = settings()
    wanted = manifest(chosen)
    server.create(wanted)
    threading.Timer(0.3, completes, [server, wanted["metadata"]["name"]]).start()
    run_job(cluster(server, chosen), manifest(settings(image="newer")))
    assert any("is at work already: joining it" in message for message in messages.messages)
    assert any("made with other cluster settings" in message for message in messages.messages)
    assert shown(messages) == ["step 1", "step 2", "saved"]
    assert server.count("DELETE", "") == 1  # once, after it was complete


def test_a_lost_answer_to_the_creation_makes_no_second_job(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teefusion.cluster._FIRST_PAUSE_S", 0.02)
    server.lost_answers, server.plays = 1, [completes]
    run(server)
    assert server.count("POST", JOBS) == 2  # of which the second was told 409
    assert not server.plays


@pytest.mark.parametrize("outcome", ["Failed", "Complete"])
def test_an_ended_job_gives_way_once_it_is_quite_gone(server: ApiServer, outcome: str) -> None:
    name = manifest(settings())["metadata"]["name"]
    server.create(manifest(settings()))
    server.condition(name, outcome)
    server.finalizer_s, server.plays = 0.3, [completes]
    run(server)
    assert server.count("DELETE", name) == 2
    assert not server.plays


def test_a_job_that_is_being_deleted_is_waited_for(server: ApiServer) -> None:
    wanted = manifest(settings())
    server.create(wanted)
    server.finalizer_s, server.plays = 0.3, [completes]
    server.delete(wanted["metadata"]["name"], {"propagationPolicy": "Foreground"})
    run(server)
    assert not server.plays


def test_a_deleted_job_that_never_goes_is_an_error(server: ApiServer) -> None:
    wanted = manifest(settings())
    server.create(wanted)
    server.finalizer_s = 30.0
    server.delete(wanted["metadata"]["name"], {"propagationPolicy": "Foreground"})
    with pytest.raises(ClusterError, match="is being deleted and does not go. Look at its pods and finalizers"):
        run(server, patience_s=0.3)


def test_a_job_at_work_on_other_folders_is_not_joined(server: ApiServer) -> None:
    server.create(manifest(settings(), output="/shared/elsewhere"))
    with pytest.raises(TrainingError, match=r"with other folders.*elsewhere.*kubectl delete trainjob"):
        run(server)
    assert server.jobs


def test_the_workflow_of_this_step_owns_the_job(server: ApiServer, monkeypatch: pytest.MonkeyPatch) -> None:
    workflow = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "distill-x", "uid": "u-1"}
    server.pods["step"] = {"metadata": {"name": "step", "ownerReferences": [workflow | {"controller": True}]}}
    found = cluster(server, settings())
    assert found.owner() is None  # this process is no step
    monkeypatch.setenv("KFP_POD_NAME", "step")
    assert found.owner() == workflow
    server.pods["step"]["metadata"] = {"name": "step"}
    assert found.owner() is None


def test_a_step_that_cannot_be_read_makes_a_job_without_an_owner(
    server: ApiServer, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "step")
    server.forbidden = {("get", "pods")}
    assert cluster(server, settings()).owner() is None
    assert "it outlives a deleted run" in messages.text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_deletes_the_job(server: ApiServer, tmp_path: Path, number: int) -> None:
    program = (
        "import logging, signal, sys\n"
        "from pathlib import Path\n"
        "from teefusion import launch\n"
        "from teefusion.settings import settings_from_json\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where a shell runs tests in background
        "launch.run_targets(settings_from_json(sys.argv[1]), prompts=Path('/shared/p'), output='s3://bucket/t')\n"
    )
    chosen = settings(namespace=None)
    process = subprocess.Popen(
        [sys.executable, "-c", program, chosen.to_json()],
        env=os.environ | {"KUBECONFIG": str(server.kubeconfig(tmp_path / "config"))},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        until(lambda: server.count("GET", WATCH) > 0)
        name = trainjob_name("targets", chosen.run_key)
        assert server.jobs.keys() == {name}
        process.send_signal(number)
        _, told = process.communicate(timeout=20)
    finally:
        process.kill()
    assert f"stopped: deleting TrainJob {name}" in told
    assert process.returncode in (128 + number, -number)
    until(lambda: not server.jobs)


def test_the_signals_handler_is_put_back(server: ApiServer) -> None:
    before = signal.getsignal(signal.SIGTERM)
    server.plays = [completes]
    run(server)
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_may_run_a_job(server: ApiServer) -> None:
    server.plays = [completes]
    thread = threading.Thread(target=run, args=[server])
    thread.start()
    thread.join(20)
    assert not thread.is_alive()
    assert not server.plays
