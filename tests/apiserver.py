"""A Kubernetes API server as far as a TrainJob needs one, over HTTP, with its habits and its faults.

A test says what happens to a job once it is made (``plays``), what is forbidden or missing, and what becomes of the
next watches: ``gone`` answers 410 within the stream, ``refused`` answers it at once, ``drop`` resets the connection.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tests.doubles import Double, Handler

NAMESPACE = "team"
_JOBS = rf"/apis/trainer\.kubeflow\.org/v1alpha1/namespaces/{NAMESPACE}/trainjobs"
_CORE = rf"/api/v1/namespaces/{NAMESPACE}"
Play = Callable[["ApiServer", str], None]


class ApiServer(Double):
    """``with ApiServer() as server``: then a client of ``server.url`` finds one namespace and no jobs."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.events: list[dict[str, Any]] = []
        self.logs: dict[str, list[tuple[str, str]]] = {}
        self.runtimes = {"teefusion-torch"}
        self.installed = True
        self.forbidden: set[tuple[str, str]] = set()  # (verb, resource)
        self.busy = 0  # so many requests are answered 503 first
        self.lost_answers = 0  # so many POSTs are done, and their answer lost
        self.watch_fates: list[str] = []
        self.log_breaks_after: int | None = None  # lines, once
        self.finalizer_s = 0.0  # a deleted job stays so long
        self.plays: list[Play] = []  # of the next jobs made
        self.requests: list[tuple[str, str]] = []
        self._version, self._changed = 1, threading.Condition()
        super().__init__(_Handler)

    def count(self, method: str, path: str) -> int:
        """Requests so far with this method whose path and query match."""
        return sum(found == method and re.search(path, target) is not None for found, target in self.requests)

    def kubeconfig(self, path: Path) -> Path:
        """A file with which clients find this server."""
        context = {"cluster": "double", "user": "double", "namespace": NAMESPACE}
        value = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "double",
            "clusters": [{"name": "double", "cluster": {"server": self.url}}],
            "users": [{"name": "double", "user": {"token": "t"}}],
            "contexts": [{"name": "double", "context": context}],
        }
        path.write_text(json.dumps(value))
        return path

    # --- what happens to jobs ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """Around every change, so that watches see it."""
        with self._changed:
            yield
            self._version += 1
            self._changed.notify_all()

    def condition(self, name: str, kind: str, reason: str = "", message: str = "") -> None:
        """Set a condition of a job."""
        with self.change():
            job = self.jobs[name]
            job["status"].setdefault("conditions", []).append(
                {"type": kind, "status": "True", "reason": reason, "message": message}
            )
            self._stamp(job)

    def start(self, name: str, *, nodes: int = 1, attempt: str = "a") -> None:
        """The job's pods run."""
        with self.change():
            for node in range(nodes):
                pod = f"{name}-node-0-{node}-{attempt}"
                self.pods[pod] = {
                    "metadata": {
                        "name": pod,
                        "creationTimestamp": f"2026-01-01T00:00:0{len(self.pods)}Z",
                        "labels": {
                            "jobset.sigs.k8s.io/jobset-name": name,
                            "batch.kubernetes.io/job-completion-index": str(node),
                        },
                    },
                    "status": {"phase": "Running"},
                }
                self.logs.setdefault(pod, [])
            self.jobs[name]["status"]["jobsStatus"] = [{"name": "node", "ready": 1, "active": 1, "succeeded": 0}]
            self._stamp(self.jobs[name])

    def say(self, pod: str, *lines: str) -> None:
        """More of a pod's log."""
        with self.change():
            for line in lines:
                self.logs[pod].append((f"2026-01-01T00:00:00.{self._tick():09d}Z", line))

    def end(self, pod: str, *, code: int = 0, reason: str = "", at: str = "2026-01-01T00:01:00Z") -> None:
        """A pod's container ends."""
        with self.change():
            state = {"terminated": {"exitCode": code, "reason": reason or "Error", "finishedAt": at}}
            self.pods[pod]["status"] = {
                "phase": "Failed" if code else "Succeeded",
                "containerStatuses": [{"name": "node", "state": state}],
            }

    def warn(self, thing: str, reason: str, message: str) -> None:
        """An event."""
        event = {"type": "Warning", "reason": reason, "message": message, "involvedObject": {"name": thing}}
        with self.change():
            self.events.append(event)

    def remove(self, name: str) -> None:
        """A job is gone, its pods too."""
        with self.change():
            self.jobs.pop(name, None)
            for pod in [pod for pod in self.pods if pod.startswith(f"{name}-")]:
                del self.pods[pod]

    def _tick(self) -> int:
        self._ticks = getattr(self, "_ticks", 0) + 1
        return self._ticks

    def _stamp(self, job: dict[str, Any]) -> None:
        job["metadata"]["resourceVersion"] = str(self._version + 1)

    # --- what requests meet --------------------------------------------------------------------------------------

    def create(self, job: dict[str, Any]) -> tuple[int, Any]:
        name = job["metadata"]["name"]
        if name in self.jobs:
            return 409, _status(409, "AlreadyExists", f'trainjobs.trainer.kubeflow.org "{name}" already exists')
        with self.change():
            self.jobs[name] = {**job, "status": {}}
            self._stamp(self.jobs[name])
        if self.plays:
            threading.Thread(target=self.plays.pop(0), args=(self, name), daemon=True).start()
        return 201, self.jobs[name]

    def delete(self, name: str, query: dict[str, str]) -> tuple[int, Any]:
        if name not in self.jobs:
            return 404, _status(404, "NotFound", "not found", name=name)
        assert query["propagationPolicy"] == "Foreground"
        job = self.jobs[name]
        with self.change():
            job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
        threading.Timer(self.finalizer_s, self.remove, [name]).start()
        return 200, job

    def review(self, asked: dict[str, Any]) -> dict[str, Any]:
        what = asked["spec"]["resourceAttributes"]
        assert what["namespace"] == NAMESPACE
        assert what["group"] == ("trainer.kubeflow.org" if what["resource"].startswith("train") else "")
        resource = "/".join(part for part in (what["resource"], what.get("subresource")) if part)
        return {"status": {"allowed": (what["verb"], resource) not in self.forbidden}}

    def listed(self, query: dict[str, str]) -> dict[str, Any]:
        name = query["fieldSelector"].removeprefix("metadata.name=")
        items = [job for key, job in self.jobs.items() if key == name]
        return {"metadata": {"resourceVersion": str(self._version)}, "items": items}

    def changes(self, query: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Events of a watch since its version, until its time is over."""
        name, seen = query["fieldSelector"].removeprefix("metadata.name="), int(query["resourceVersion"])
        end = time.monotonic() + float(query["timeoutSeconds"])
        known = name in self.jobs
        while (left := end - time.monotonic()) > 0:
            with self._changed:
                job = self.jobs.get(name)
                if job and int(job["metadata"]["resourceVersion"]) > seen:
                    seen, known = int(job["metadata"]["resourceVersion"]), True
                    event = {"type": "MODIFIED", "object": job}
                elif known and job is None:
                    known, event = False, {"type": "DELETED", "object": {"metadata": {"name": name}}}
                else:
                    self._changed.wait(left)
                    continue
            yield event

    def log(self, pod: str, query: dict[str, str]) -> Iterator[str]:
        """Lines with time stamps, as long as the pod runs."""
        shown, broken = 0, self.log_breaks_after
        while True:
            with self._changed:
                lines = self.logs[pod][shown:]
                over = self.pods.get(pod, {}).get("status", {}).get("phase") != "Running"
                if not lines and not over:
                    self._changed.wait(0.5)
                    continue
            for stamp, line in lines:
                if broken is not None and shown == broken:
                    self.log_breaks_after = None
                    time.sleep(0.1)  # a reset takes away what has not been read
                    raise ConnectionResetError
                yield f"{stamp} {line}\n"
                shown += 1
            if over:
                return


class _Handler(Handler):
    double: ApiServer

    def respond(self) -> None:
        self.double.requests.append((self.command, self.path))
        path, query, body = self.read()
        if self.double.busy:
            self.double.busy -= 1
            self.answer(503, _status(503, "ServiceUnavailable", "the apiserver is starting"))
            return
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._route(path, query, body)

    def _route(self, path: str, query: dict[str, str], body: bytes) -> None:
        if "trainer.kubeflow.org" in path and not self.double.installed:
            self.answer(404, "404 page not found")
        elif path == "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews":
            self.answer(201, self.double.review(json.loads(body)))
        elif refusal := self._forbidden(path, query):
            self.answer(403, refusal)
        elif match := re.fullmatch(rf"{_JOBS}(?:/(.+))?", path):
            self._jobs(match[1], query, body)
        elif match := re.fullmatch(r".*/(?:cluster)?trainingruntimes/(.+)", path):
            known = match[1] in self.double.runtimes
            self.answer(200 if known else 404, {} if known else _status(404, "NotFound", "", name=match[1]))
        elif match := re.fullmatch(rf"{_CORE}/pods/([^/]+)/log", path):
            self._log(match[1], query)
        elif match := re.fullmatch(rf"{_CORE}/pods/([^/]+)", path):
            self.answer(200, self.double.pods[match[1]])
        elif path == f"{_CORE}/pods":
            key, _, value = query["labelSelector"].partition("=")
            chosen = [pod for pod in self.double.pods.values() if pod["metadata"]["labels"].get(key) == value]
            self.answer(200, {"items": chosen})
        elif path == f"{_CORE}/events":
            self.answer(200, {"items": self.double.events})
        else:
            self.answer(404, _status(404, "NotFound", f"no namespace for {path}", kind="namespaces"))

    def _jobs(self, name: str | None, query: dict[str, str], body: bytes) -> None:
        if self.command == "POST":
            status, answer = self.double.create(json.loads(body))
            if self.double.lost_answers:
                self.double.lost_answers -= 1
                self.reset()
                return
            self.answer(status, answer)
        elif self.command == "DELETE":
            self.answer(*self.double.delete(name or "", query))
        elif query.get("watch"):
            self._watch(query)
        else:
            self.answer(200, self.double.listed(query))

    def _watch(self, query: dict[str, str]) -> None:
        fate = self.double.watch_fates.pop(0) if self.double.watch_fates else ""
        gone = _status(410, "Expired", "too old resource version: 1 (2)")
        if fate == "refused":
            self.answer(410, gone)
            return
        self._begin()
        if fate == "gone":
            self._chunk(json.dumps({"type": "ERROR", "object": gone}) + "\n")
        elif fate == "drop":
            self._chunk('{"type": "MODIFIED", "obj')
            self.reset()
            return
        else:
            for event in self.double.changes(query):
                self._chunk(json.dumps(event) + "\n")
        self._chunk("")

    def _log(self, pod: str, query: dict[str, str]) -> None:
        if pod not in self.double.logs:
            self.answer(404, _status(404, "NotFound", f'pods "{pod}" not found'))
        elif not query.get("follow"):
            lines = [line for _, line in self.double.logs[pod]][-int(query["tailLines"]) :]
            self.answer(200, "\n".join(lines) + "\n")
        else:
            self._begin()
            try:
                for line in self.double.log(pod, query):
                    self._chunk(line)
            except ConnectionResetError:
                self.reset()
                return
            self._chunk("")

    def _forbidden(self, path: str, query: dict[str, str]) -> dict[str, Any] | None:
        parts = path.split("/namespaces/")[-1].split("/")[1:]
        resource = "pods/log" if parts[-1:] == ["log"] else parts[0] if parts else ""
        verb = {"POST": "create", "DELETE": "delete"}.get(self.command, "get" if parts[1:] else "list")
        if (verb, resource) not in self.double.forbidden:
            return None
        user = f'User "system:serviceaccount:{NAMESPACE}:pipeline-runner"'
        told = f'{resource} is forbidden: {user} cannot {verb} resource "{resource}" in the namespace'
        return _status(403, "Forbidden", told)

    def _begin(self) -> None:
        self.send_response_only(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _status(code: int, reason: str, message: str, **details: str) -> dict[str, Any]:
    return {"kind": "Status", "code": code, "reason": reason, "message": message, "details": details}
