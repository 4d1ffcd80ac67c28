"""A Kubernetes API server as far as both Helms need one, over HTTP: discovery, objects, watches; nothing runs.

Helm 4 applies on the server's side, Helm 3 creates objects and patches them by what it found to differ. Jobs and pods
are done as soon as they are made. Fields that cannot be changed are refused, as a real server does.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import yaml

from tests.helms import Helm3, Helm4
from tests.patches import merge_patched, strategically_patched

Json = dict[str, Any]
_KINDS = {
    "v1": "Secret ConfigMap Service ServiceAccount Pod PersistentVolumeClaim",
    "apps/v1": "Deployment StatefulSet",
    "batch/v1": "Job CronJob",
    "networking.k8s.io/v1": "NetworkPolicy Ingress",
    "policy/v1": "PodDisruptionBudget",
    "autoscaling/v2": "HorizontalPodAutoscaler",
    "rbac.authorization.k8s.io/v1": "Role RoleBinding",
    "trainer.kubeflow.org/v1alpha1": "TrainingRuntime",
    "argoproj.io/v1alpha1": "Application",  # Argo CD's: there are no Argo Workflows
    "monitoring.coreos.com/v1": "ServiceMonitor PrometheusRule",
    "kueue.x-k8s.io/v1beta2": "LocalQueue",
}
_IMMUTABLE = {
    "Deployment": ("selector",),
    "StatefulSet": ("selector", "serviceName", "volumeClaimTemplates"),
    "Job": ("selector", "template"),
    "PersistentVolumeClaim": ("accessModes", "storageClassName"),
    "RoleBinding": ("roleRef",),
}
_DONE = {
    "Job": {"conditions": [{"type": "Complete", "status": "True"}], "succeeded": 1},
    "Pod": {"phase": "Succeeded", "conditions": []},
}
# OpenAPI v2 without definitions, in the binary form that clients ask for: nothing is validated by it.
_OPENAPI = b"\x0a\x032.0"


def _plural(kind: str) -> str:
    name = kind.lower()
    return f"{name[:-1]}ies" if name.endswith("y") else f"{name}es" if name.endswith("ss") else f"{name}s"


def _selected(thing: Json, query: str) -> bool:
    """Whether the selectors of a list or a watch let an object through; only equalities are known."""
    asked = parse_qs(query)
    labels = thing["metadata"].get("labels", {})
    pairs = [pair.split("=") for text in asked.get("labelSelector", []) for pair in text.split(",")]
    names = [text.removeprefix("metadata.name=") for text in asked.get("fieldSelector", [])]
    return all(labels.get(key) == value for key, value in pairs) and names in ([], [thing["metadata"]["name"]])


class Refusal(Exception):  # noqa: N818  # an answer, as HTTPException is
    """An answer that is a Status."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason}
        self.status["message"] = message


class HelmCluster:
    """``with HelmCluster(namespace) as cluster``: then ``cluster.helm`` installs there, and its releases go with it."""

    def __init__(self, namespace: str, helm3: Path | None = None) -> None:
        """By Helm 4, or by the binary ``helm3``."""
        self.namespace = namespace
        self._helm3 = helm3
        self.things: dict[tuple[str, str], Json] = {}  # by kind and name
        self._version = 0
        self._log: list[tuple[str, Json]] = []  # what happened to which object
        self._happened = threading.Condition()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())

    def __enter__(self) -> HelmCluster:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": {"server": f"http://127.0.0.1:{self._server.server_port}"}}],
            "users": [{"name": "test", "user": {}}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
            "current-context": "test",
        }
        text = json.dumps(kubeconfig)
        self.helm: Helm3 | Helm4 = (
            Helm3(self._helm3, text, self.namespace) if self._helm3 else Helm4(text, self.namespace)
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.helm.close()
        self._server.shutdown()
        self._server.server_close()

    def names(self, kind: str) -> set[str]:
        """Of what the chart made; Helm 3 keeps its releases in Secrets beside them."""
        return {name for found, name in self.things if found == kind and not name.startswith("sh.helm.release.")}

    def secret(self, name: str) -> dict[str, str]:
        """What is in a Secret."""
        data = self.things["Secret", name]["data"]
        return {key: base64.b64decode(value).decode() for key, value in data.items()}

    def answer(self, method: str, path: str, query: str, body: bytes, form: str) -> Json:
        """To a request for anything but a watch, with a body of media type ``form``. Raises Refusal."""
        if (found := self._discovery(path)) is not None:
            return found
        kind, name = self._target(path)
        if kind is None:  # the namespace itself
            return {"kind": "Namespace", "apiVersion": "v1", "metadata": {"name": name}}
        if method in ("PATCH", "POST", "PUT"):
            how = form if method == "PATCH" else method
            return self._put(kind, self._written(kind, name, yaml.safe_load(body), how))
        if not name:
            return {
                "kind": f"{kind}List",
                "metadata": {"resourceVersion": str(self._version)},
                "items": [thing for thing in self._all(kind) if _selected(thing, query)],
            }
        if (kind, name) not in self.things:
            raise Refusal(404, "NotFound", f"{kind} {name} not found")
        if method == "DELETE":
            self._tell("DELETED", self.things.pop((kind, name)))
            return {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        return self.things[kind, name]

    def _written(self, kind: str, name: str, sent: Json, how: str) -> Json:
        """The object that a request makes: ``how`` is POST, PUT or the media type of a patch."""
        there = self.things.get((kind, name or sent["metadata"]["name"]))
        if how == "POST" and there:
            raise Refusal(409, "AlreadyExists", f"{kind} {name} already exists")
        if "merge-patch" not in how:
            return sent
        if there is None:
            raise Refusal(404, "NotFound", f"{kind} {name} not found")
        return (strategically_patched if "strategic" in how else merge_patched)(there, sent)

    def watch(self, path: str, query: str) -> Iterator[Json]:
        """Events without end: first of what is there, then as they come."""
        kind, _ = self._target(path)
        assert kind is not None
        seen = len(self._log)
        mark = {"resourceVersion": str(self._version), "annotations": {"k8s.io/initial-events-end": "true"}}
        group = next(group for group, kinds in _KINDS.items() if kind in kinds.split())
        end = {"type": "BOOKMARK", "object": {"kind": kind, "apiVersion": group, "metadata": mark}}
        yield from ({"type": "ADDED", "object": thing} for thing in self._all(kind) if _selected(thing, query))
        yield end
        while True:
            with self._happened:
                while len(self._log) == seen:
                    self._happened.wait()
                new, seen = self._log[seen:], len(self._log)
            yield from (
                {"type": event, "object": thing}
                for event, thing in new
                if thing["kind"] == kind and _selected(thing, query)
            )

    def _tell(self, event: str, thing: Json) -> None:
        with self._happened:
            self._log.append((event, thing))
            self._happened.notify_all()

    def _discovery(self, path: str) -> Json | None:
        if path == "/version":
            return {"major": "1", "minor": "33", "gitVersion": "v1.33.0"}
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            versions = [(group.split("/")[0], {"groupVersion": group, "version": group.split("/")[1]})
                        for group in _KINDS if "/" in group]  # fmt: skip
            groups = [{"name": name, "versions": [one], "preferredVersion": one} for name, one in versions]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}
        group = re.sub(r"^/apis?/", "", path)
        if group not in _KINDS:
            return None
        verbs = ["create", "delete", "get", "list", "patch", "watch"]
        resources = [
            {"name": _plural(kind), "singularName": kind.lower(), "namespaced": True, "kind": kind, "verbs": verbs}
            for kind in _KINDS[group].split()
        ]
        return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group, "resources": resources}

    def _target(self, path: str) -> tuple[str | None, str]:
        found = re.search(rf"/namespaces/{self.namespace}(?:/([a-z]+)(?:/([^/]+))?)?$", path)
        if found is None:
            raise Refusal(404, "NotFound", f"{path} is not here")
        kinds = {_plural(kind): kind for group in _KINDS.values() for kind in group.split()}
        return (kinds[found[1]], found[2] or "") if found[1] else (None, self.namespace)

    def _put(self, kind: str, thing: Json) -> Json:
        name = thing["metadata"]["name"]
        old = self.things.get((kind, name))
        for field in _IMMUTABLE.get(kind, ()) if old else ():
            new_value = thing.get("spec", thing).get(field)
            if (old or {}).get("spec", old or {}).get(field) != new_value:
                raise Refusal(422, "Invalid", f"{kind} {name}: field {field} is immutable")
        self._version += 1
        thing["metadata"] |= {"uid": name, "resourceVersion": str(self._version), "generation": 1}
        encoded = {key: base64.b64encode(text.encode()).decode() for key, text in thing.pop("stringData", {}).items()}
        if encoded:
            thing["data"] = thing.get("data", {}) | encoded
        self.things[kind, name] = thing | ({"status": _DONE[kind]} if kind in _DONE else {})
        self._tell("MODIFIED" if old else "ADDED", self.things[kind, name])
        return self.things[kind, name]

    def _all(self, kind: str) -> list[Json]:
        return [thing for (found, _), thing in self.things.items() if found == kind]

    def _handler(outer) -> type[BaseHTTPRequestHandler]:  # noqa: N805  # `self` is the request's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else each answer waits 40 ms

            def _any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                path, _, query = self.path.partition("?")
                if path == "/openapi/v2":
                    return self._send(200, _OPENAPI, "application/com.github.proto-openapi.spec.v2.v1.0+protobuf")
                if parse_qs(query).get("watch") in (["true"], ["1"]):
                    return self._stream(outer.watch(path, query))
                try:
                    form = self.headers.get("Content-Type", "")
                    found, code = outer.answer(self.command, path, query, body, form), 200
                except Refusal as refusal:
                    found, code = refusal.status, refusal.code
                return self._send(code, json.dumps(found).encode(), "application/json")

            def _send(self, code: int, body: bytes, kind: str) -> None:
                self.send_response(code)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def _stream(self, events: Iterator[Json]) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has seen enough
                    for event in events:
                        line = json.dumps(event).encode() + b"\n"
                        self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

            def log_message(self, *_: object) -> None:
                """Quiet."""

        return Handler
