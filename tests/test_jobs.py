"""TrainJobs against an API server that refuses, forgets, breaks off and restarts: what is told, paid for and left."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from teefusion import launch
from teefusion.cluster import Cluster
from teefusion.errors import ClusterError, SettingsError, TrainingError
from teefusion.files import read_json, write_json
from teefusion.jobs import run_job
from teefusion.manifests import read_manifest
from teefusion.settings import Settings, load_settings
from teefusion.stages.ingest import ingest
from teefusion.stages.targets import targets
from teefusion.stages.train import train
from teefusion.storage import FolderStore
from teefusion.trainjobs import Work, build_trainjob, trainjob_name
from tests.apiserver import NAMESPACE, ApiServer
from tests.s3 import free_port

JOBS = r"/trainjobs(\?|$)"
WATCH = "watch=True"


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as found:
        yield found


@pytest.fixture(autouse=True)
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="teefusion")
    return caplog


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


# --- making, following, ending ------------------------------------------------------------------------------------


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


# --- one run, one job ---------------------------------------------------------------------------------------------


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


# --- what is told while it runs -----------------------------------------------------------------------------------


def test_events_become_messages_each_once(server: ApiServer, messages: pytest.LogCaptureFixture) -> None:
    def play(api: ApiServer, name: str) -> None:
        pod = f"{name}-node-0-0-a"
        api.condition(name, "Suspended", "Suspended", "TrainJob is suspended")
        api.warn(f"{name}-node-0", "FailedCreate", "exceeded quota: gpus")
        for _ in range(3):
            api.warn(pod, "FailedScheduling", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
        api.warn(pod, "Failed", "Error: ErrImagePull")
        api.warn("somebody-elses-pod", "FailedScheduling", "not ours")
        api.warn(f"{name}9-node-0-0-a", "FailedScheduling", "not ours")
        time.sleep(0.5)
        completes(api, name)

    server.plays = [play]
    name = run(server)
    text = messages.text
    assert text.count("FailedScheduling: 0/3 nodes are available") == 1
    assert text.count(f"{name}-node-0-0-a: Failed: Error: ErrImagePull") == 1
    assert text.count("FailedCreate: exceeded quota: gpus") == 1
    assert text.count("while it waits in a queue: TrainJob is suspended") == 1
    assert "not ours" not in text


def test_a_job_that_does_not_start_in_time_is_deleted_with_the_reason(server: ApiServer) -> None:
    server.plays = [lambda api, name: api.warn(f"{name}-node-0-0-a", "FailedScheduling", "0/3 nodes")]
    with pytest.raises(TrainingError, match=r"did not start .* in 0.5 s .*last warning was: FailedScheduling: 0/3"):
        run(server, start_timeout_s=0.5)
    assert server.count("DELETE", JOBS.replace("(", "/teefusion.*(")) == 1


def test_a_started_job_may_take_as_long_as_it_likes(server: ApiServer) -> None:
    def play(api: ApiServer, name: str) -> None:
        api.start(name, nodes=2)
        time.sleep(0.8)
        api.end(f"{name}-node-0-0-a")
        api.condition(name, "Complete")

    server.plays = [play]
    run(server, start_timeout_s=0.4)
    assert server.count("POST", JOBS) == 1


def test_the_log_goes_on_after_a_broken_stream_without_a_line_twice(
    server: ApiServer, messages: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teefusion.joblogs._RETRY_S", 0.05)
    server.log_breaks_after, server.plays = 1, [completes]
    run(server)
    assert shown(messages) == ["step 1", "step 2", "saved"]
    assert server.count("GET", "sinceSeconds=") >= 1


def test_a_restarted_jobs_new_pod_is_followed(server: ApiServer, messages: pytest.LogCaptureFixture) -> None:
    def play(api: ApiServer, name: str) -> None:
        api.start(name, attempt="a")
        api.say(f"{name}-node-0-0-a", "first attempt")
        time.sleep(0.4)
        api.end(f"{name}-node-0-0-a", code=1)
        api.start(name, attempt="b")
        api.say(f"{name}-node-0-0-b", "second attempt")
        time.sleep(0.4)
        api.end(f"{name}-node-0-0-b")
        api.condition(name, "Complete")

    server.plays = [play]
    run(server)
    assert shown(messages) == ["first attempt", "second attempt"]
    assert any("starts again, from its last checkpoint" in message for message in messages.messages)


# --- an API that is away, forgets, or refuses ---------------------------------------------------------------------


@pytest.mark.parametrize("fate", ["gone", "refused", "drop"])
def test_watches_that_break_off_are_taken_up_again(
    server: ApiServer, fate: str, monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    def play(api: ApiServer, name: str) -> None:
        _until(lambda: not api.watch_fates)
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


# --- the workflow that owns it ------------------------------------------------------------------------------------


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


# --- told to stop -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_deletes_the_job(server: ApiServer, tmp_path: Path, number: int) -> None:
    program = (
        "import logging, sys\n"
        "from pathlib import Path\n"
        "from teefusion import launch\n"
        "from teefusion.settings import settings_from_json\n"
        "logging.basicConfig(level=logging.INFO)\n"
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
        _until(lambda: server.count("GET", WATCH) > 0)
        name = trainjob_name("targets", chosen.run_key)
        assert server.jobs.keys() == {name}
        process.send_signal(number)
        _, told = process.communicate(timeout=20)
    finally:
        process.kill()
    assert f"stopped: deleting TrainJob {name}" in told
    assert process.returncode in (128 + number, -number)
    _until(lambda: not server.jobs)


def _until(true: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


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


# --- from the stages ----------------------------------------------------------------------------------------------


@pytest.fixture
def shared(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a run on a shared volume at ``tmp_path``, with a way to the server."""
    config = str(server.kubeconfig(tmp_path / "config"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", config)
    run = settings(namespace=None, volume_path=str(tmp_path))
    return run.model_copy(update={"workdir": tmp_path / "work"})


def test_training_returns_the_record_that_the_pods_wrote(server: ApiServer, shared: Settings, tmp_path: Path) -> None:
    def play(api: ApiServer, name: str) -> None:
        (output,) = [
            argument.removeprefix("--output=")
            for argument in api.jobs[name]["spec"]["trainer"]["args"]
            if argument.startswith("--output=")
        ]
        completes(api, name)
        time.sleep(0.5)  # a network file system shows it later
        write_json(Path(output) / "training.json", {"steps": 6})

    server.plays = [play]
    output = tmp_path / "work" / "students" / "S"
    record = launch.run_training(shared, prompts=tmp_path / "p", targets="s3://bucket/t", output=output)
    assert record == {"steps": 6}


def test_a_complete_job_whose_output_is_not_here_is_told(
    server: ApiServer, shared: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_PUBLISHED_PATIENCE_S", 0.1)
    server.plays = [completes]
    with pytest.raises(TrainingError, match=r"is complete, but .*manifest.json is not here. Mount the same volume"):
        launch.run_targets(shared, prompts=tmp_path / "p", output=str(tmp_path / "targets"))


def test_targets_in_s3_need_nothing_here(server: ApiServer, shared: Settings, tmp_path: Path) -> None:
    server.plays = [completes]
    launch.run_targets(shared, prompts=tmp_path / "p", output="s3://bucket/t")
    assert not server.plays


def test_folders_of_this_machine_are_refused_before_anything_is_asked(
    server: ApiServer, shared: Settings, tmp_path: Path
) -> None:
    alone = shared.cluster.model_copy(update={"volume_claim": None, "volume_path": None})
    with pytest.raises(SettingsError, match=r"which the pods of a TrainJob cannot see. Set cluster.volume_claim"):
        launch.run_targets(shared.model_copy(update={"cluster": alone}), prompts=tmp_path / "p", output="s3://bucket/t")
    assert not server.requests


# --- end to end: the double's pods really run ---------------------------------------------------------------------


class Pods:
    """Runs what a job's manifest says, a process a node, as Trainer's torch policy would start it."""

    def __call__(self, server: ApiServer, name: str) -> None:
        trainer = server.jobs[name]["spec"]["trainer"]
        assert trainer["command"] == ["torchrun"]
        server.start(name, nodes=trainer["numNodes"])
        port = str(free_port())
        nodes = [self._node(trainer, node, port) for node in range(trainer["numNodes"])]
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
        for node, (process, output) in enumerate(zip(nodes, outputs, strict=True)):
            server.say(f"{name}-node-0-{node}-a", *output.splitlines())
            server.end(f"{name}-node-0-{node}-a", code=process.returncode)
        failed = any(process.returncode for process in nodes)
        server.condition(name, "Failed" if failed else "Complete")

    def _node(self, trainer: dict[str, Any], node: int, port: str) -> subprocess.Popen[str]:
        """One node, with the variables that tell torchrun where it is."""
        pet = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(node),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
        }
        # No Secret is there, and the variables of one that may be missing are left out.
        assert all("value" in entry or entry["valueFrom"]["secretKeyRef"]["optional"] for entry in trainer["env"])
        variables = {entry["name"]: entry["value"].replace("$$", "$") for entry in trainer["env"] if "value" in entry}
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *trainer["args"]],
            env=os.environ | pet | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.mark.slow
def test_stages_on_two_nodes_make_what_one_process_makes(
    server: ApiServer,
    make_settings: Callable[..., Settings],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    messages: pytest.LogCaptureFixture,
) -> None:
    config = str(server.kubeconfig(tmp_path / "config"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", config)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shared = {"cluster.volume_claim": "claim", "cluster.volume_path": str(tmp_path_factory.getbasetemp())}
    here = make_settings()
    there = make_settings({"workdir": tmp_path / "there", "cluster.nodes": 2, "cluster.poll_s": 0.5, **shared})
    assert here.run_key == there.run_key
    server.plays = [Pods(), Pods()]
    records = {}
    for run in (here, there):
        prompts = Path(ingest(run).output)
        made = targets(run, prompts)
        assert not made.reused
        student = train(run, prompts, made.output)
        record = read_json(Path(student.output) / "training.json")
        records[run.workdir.name] = (read_manifest(FolderStore(Path(made.output))), record)
    (alone, one), (many, two) = records["work"], records["there"]
    assert many == alone
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["guidance_residual"] == pytest.approx(one["guidance_residual"], rel=1e-3)
    assert not server.plays
    assert any("train: 6/6 step" in line for line in shown(messages))


@pytest.mark.slow
def test_what_a_rank_says_when_it_fails_is_in_the_error(
    server: ApiServer, make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(server.kubeconfig(tmp_path / "config"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", config)
    chosen = make_settings(
        {
            "cluster.launcher": "trainjob",
            "cluster.volume_claim": "claim",
            "cluster.volume_path": "/",
            "cluster.poll_s": 0.5,
        }
    )
    server.plays = [Pods()]
    with pytest.raises(
        TrainingError, match=r"node-0-0-a ended with exit code 1 \(Error\); its last lines:\n"
    ) as caught:
        launch.run_training(chosen, prompts=tmp_path / "p", targets=str(tmp_path / "none"), output=tmp_path / "out")
    assert "is no finished target set: manifest.json is missing. Run 'teefusion targets' first." in str(caught.value)
    assert "ChildFailedError" not in str(caught.value)
