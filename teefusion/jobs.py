"""Run a TrainJob to its end: make it or join it, tell what becomes of it, and delete it when we are told to stop.

A job is named by its run. So a step that died and is tried again joins the job that goes on, and pays once. A job that
has ended is of an earlier attempt: it gives way to a new one, which continues from its checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from teefusion.cluster import Cluster, Json
from teefusion.errors import ClusterError, TrainingError
from teefusion.joblogs import LogFollower
from teefusion.settings import JobStage
from teefusion.stopping import terminable
from teefusion.trainjobs import DIGEST, NODE, trainjob_name

log = logging.getLogger("teefusion.jobs")
_LAST_LINES = 30
_READ_LINES = 300  # to find them in: torchrun ends with a traceback of its own, and a paragraph a rank
_TORCHRUN = "torch/distributed/elastic/"
_TORCHRUN_ENDS = "failed (exitcode:"
_STOP_PATIENCE_S = 15.0  # of the 30 s that Kubernetes leaves between SIGTERM and SIGKILL
_LOG_PATIENCE_S = 10.0  # for the last lines of a job that has ended
_SHORTEST_WATCH_S = 1.0  # where watches break off at once
_GONE_POLL_S = 1.0


def run_job(cluster: Cluster, manifest: Mapping[str, Any]) -> None:
    """Make or join the TrainJob and wait until it is complete, its first node's log in ours.

    SIGTERM and Ctrl-C delete the job. Raises TrainingError for a job that fails, is deleted, does not start in time, or
    does other work under this name; ClusterError for what the API refuses. After ClusterError the job goes on.
    """
    name = manifest["metadata"]["name"]
    cluster.require_runtime()
    with terminable():
        try:
            _make_or_join(cluster, manifest)
            ended = _Watcher(cluster, name).wait()
        except (KeyboardInterrupt, SystemExit):
            _delete_at_once(cluster, name)
            raise
    kind, reason = _outcome(ended) or ("Failed", "")
    if kind == "Failed":
        raise TrainingError(_failure(cluster, name, reason))
    log.info("TrainJob %s is complete", name)
    if not cluster.options.keep_finished:
        cluster.delete(name)


def delete_orphans(cluster: Cluster, run_key: str) -> None:
    """Delete the TrainJobs of a run that has ended while they are at work: a step that was killed leaves its own.

    Those of another workflow, which runs the same settings, are left alone. Raises ClusterError.
    """
    owner = cluster.owner()
    for stage in get_args(JobStage):
        name = trainjob_name(stage, run_key)
        job, _ = cluster.look(name)
        if job is None or _outcome(job):
            continue
        owners = job["metadata"].get("ownerReferences", [])
        if not owners or any(one["uid"] == (owner or {}).get("uid") for one in owners):
            log.warning("deleting TrainJob %s, which nobody waits for", name)
            cluster.delete(name)


def _make_or_join(cluster: Cluster, manifest: Mapping[str, Any]) -> None:
    """After this a job of that name does this work."""
    name = manifest["metadata"]["name"]
    while not cluster.create(manifest):
        found, _ = cluster.look(name)
        if found is None:
            continue  # it went between the two
        outcome = _outcome(found)
        if outcome is None and "deletionTimestamp" not in found["metadata"]:
            _join(found, manifest)
            return
        if outcome:
            log.info("TrainJob %s of an earlier attempt is %s: making it anew", name, outcome[0].lower())
            cluster.delete(name)
        _wait_until_gone(cluster, name)
    trainer = manifest["spec"]["trainer"]
    log.info(
        "TrainJob %s created in namespace %s: %d nodes x %d processes",
        *(name, cluster.namespace, trainer["numNodes"], trainer["numProcPerNode"]),
    )


def _join(found: Json, manifest: Mapping[str, Any]) -> None:
    name = manifest["metadata"]["name"]
    if found["spec"].get("trainer", {}).get("args") != manifest["spec"]["trainer"]["args"]:
        raise TrainingError(
            f"TrainJob {name} is at work on this run with other folders: it was given "
            f"{found['spec'].get('trainer', {}).get('args')}. Wait until it has ended, or delete it: "
            f"kubectl delete trainjob {name} --namespace {found['metadata'].get('namespace')}"
        )
    log.info("TrainJob %s is at work already: joining it", name)
    if found["metadata"].get("annotations", {}).get(DIGEST) != manifest["metadata"]["annotations"][DIGEST]:
        log.warning("it was made with other cluster settings, and keeps them until it is deleted")


def _wait_until_gone(cluster: Cluster, name: str) -> None:
    end = time.monotonic() + cluster.options.patience_s
    while cluster.look(name)[0] is not None:
        if time.monotonic() > end:
            raise ClusterError(
                f"TrainJob {name} in namespace {cluster.namespace} is being deleted and does not go. Look at its pods "
                "and finalizers (kubectl describe), then run again."
            )
        time.sleep(_GONE_POLL_S)


class _Watcher:
    """Waits for the end of a job, and tells what happens to it in the meantime; each thing once."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster, self._name = cluster, name
        self._told: set[tuple[str, ...]] = set()
        self._last_warning = ""
        self._follower: LogFollower | None = None
        self._forbidden: set[str] = set()

    def wait(self) -> Json:
        """The job as it ended, once all of its first node's log is shown."""
        ended = self._wait_for_end()
        self._look_around()  # what came since the last time; a short job's log has not been shown at all
        if self._follower:
            self._follower.finish(_LOG_PATIENCE_S)
        return ended

    def _wait_for_end(self) -> Json:
        """Every window begins with a look, so a watch may break off wherever it likes."""
        began, poll_s = time.monotonic(), self._cluster.options.poll_s
        while True:
            job, version = self._cluster.look(self._name)
            if job is None:
                raise TrainingError(f"TrainJob {self._name} was deleted while it ran. Run again to go on.")
            if self._tell(job):
                return job
            self._look_around()
            self._give_up_if_late(job, time.monotonic() - began)
            window = time.monotonic()
            for changed in self._cluster.changes(self._name, version, poll_s):
                if self._tell(changed):
                    return changed
            time.sleep(max(0.0, min(_SHORTEST_WATCH_S, poll_s) - (time.monotonic() - window)))

    def _tell(self, job: Json) -> bool:
        """Log what is new in the job's conditions; whether it has ended."""
        for condition in job.get("status", {}).get("conditions", []):
            if condition["type"] == "Suspended" and condition["status"] == "True":
                why = condition.get("message", "")
                self._once("TrainJob %s is suspended, as it is while it waits in a queue: %s", self._name, why)
        return _outcome(job) is not None

    def _look_around(self) -> None:
        """Events, and the first node's log. What may not be read is told once, and missed."""
        with self._optional("events"):
            for event in self._cluster.warnings(self._name):
                thing, reason = event["involvedObject"].get("name", ""), event.get("reason", "")
                self._last_warning = f"{reason}: {event.get('message', '')}"
                self._once("%s: %s: %s", thing, reason, event.get("message", ""))
        with self._optional("pods"):
            pod = _first_node(self._cluster.pods(self._name))
            if pod and (self._follower is None or self._follower.pod != pod):
                if self._follower:
                    log.info("TrainJob %s starts again, from its last checkpoint", self._name)
                    self._follower.finish(0)
                self._follower = LogFollower(self._cluster, pod)
                self._follower.start()

    def _give_up_if_late(self, job: Json, waited_s: float) -> None:
        limit = self._cluster.options.start_timeout_s
        if limit is None or waited_s < limit or _started(job):
            return
        self._cluster.delete(self._name)
        why = f" The last warning was: {self._last_warning}." if self._last_warning else ""
        raise TrainingError(
            f"TrainJob {self._name} did not start on all its nodes in {limit:g} s (cluster.start_timeout_s) and was "
            f"deleted.{why} Correct that, or allow more time."
        )

    def _once(self, message: str, *parts: str) -> None:
        if (message, *parts) not in self._told:
            self._told.add((message, *parts))
            log.warning(message, *parts)

    @contextlib.contextmanager
    def _optional(self, what: str) -> Iterator[None]:
        try:
            yield
        except ClusterError as error:
            if what not in self._forbidden:
                self._forbidden.add(what)
                log.warning("going on without the job's %s. %s", what, error)


def _outcome(job: Json) -> tuple[str, str] | None:
    """``Complete`` or ``Failed``, and why; none for a job that goes on."""
    for condition in job.get("status", {}).get("conditions", []):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            parts = (condition.get("reason", ""), condition.get("message", ""))
            return condition["type"], ": ".join(part for part in parts if part)
    return None


def _started(job: Json) -> bool:
    """Whether all nodes run, or have run."""
    statuses = job.get("status", {}).get("jobsStatus", [])
    return any(one["name"] == NODE and one.get("ready", 0) + one.get("succeeded", 0) > 0 for one in statuses)


def _first_node(pods: list[Json]) -> str | None:
    """Name of the newest pod of node 0 that has begun: a job that starts again makes its pods anew."""
    first = [
        pod
        for pod in pods
        if pod["metadata"].get("labels", {}).get("batch.kubernetes.io/job-completion-index") == "0"
        and pod.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")
    ]
    first.sort(key=lambda pod: pod["metadata"].get("creationTimestamp", ""))
    return first[-1]["metadata"]["name"] if first else None


def _failure(cluster: Cluster, name: str, reason: str) -> str:
    """The message for a failed job: why, and the last lines of the pod that failed first."""
    told = f"TrainJob {name} in namespace {cluster.namespace} failed ({reason or 'no reason given'})."
    advice = "Correct that and run again: what was finished is kept."
    try:
        pod = _failed_first(cluster.pods(name))
    except ClusterError as error:
        return f"{told} Its pods cannot be read: {error} {advice}"
    if pod is None:
        return f"{told} None of its pods is left to say more. {advice}"
    pod_name, how = pod
    text = cluster.last_lines(pod_name, _READ_LINES)
    return f"{told} Pod {pod_name} {how}; its last lines:\n{_own_lines(text)}\n{advice}"


def _own_lines(text: str) -> str:
    """The last lines that our ranks wrote: the reason stands there, before what torchrun says of its own end."""
    lines = text.splitlines()
    ends = [k for k, line in enumerate(lines) if _TORCHRUN in line and _TORCHRUN_ENDS in line]
    own = [line for line in lines[: ends[0] if ends else None] if _TORCHRUN not in line]
    return "\n".join((own or lines)[-_LAST_LINES:])


def _failed_first(pods: list[Json]) -> tuple[str, str] | None:
    """Name of the pod whose failure brought the others down, and how it ended."""
    failed = []
    for pod in pods:
        status = pod.get("status", {})
        states = [one.get("state", {}).get("terminated") for one in status.get("containerStatuses", [])]
        ends = [state for state in states if state and state.get("exitCode")]
        for state in ends:
            how = f"ended with exit code {state['exitCode']} ({state.get('reason', 'Error')})"
            failed.append((state.get("finishedAt") or "~", pod["metadata"]["name"], how))
        if not ends and status.get("phase") == "Failed":  # evicted, or its node was lost
            why = ": ".join(part for part in (status.get("reason"), status.get("message")) if part)
            failed.append(("~", pod["metadata"]["name"], f"failed ({why})"))
    return min(failed)[1:] if failed else None


def _delete_at_once(cluster: Cluster, name: str) -> None:
    """Delete the job, whatever more signals come; nobody waits for its pods."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    log.warning("stopped: deleting TrainJob %s", name)
    try:
        cluster.delete(name, patience_s=_STOP_PATIENCE_S)
    except ClusterError as error:
        log.error("%s It was not deleted: kubectl delete trainjob %s --namespace %s", error, name, cluster.namespace)
