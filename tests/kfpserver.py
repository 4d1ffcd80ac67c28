"""The API server of Kubeflow Pipelines as far as submitting needs it, over HTTP.

A body must be what the published OpenAPI models read and write again unchanged; a filter must name a field that there
is. Runs stay as they are until a test says otherwise (``plays``).
"""

from __future__ import annotations

import json
import re
from email.parser import BytesParser
from typing import Any
from urllib.parse import unquote

import kfp_server_api
import yaml

from tests.doubles import Double, Handler

Json = dict[str, Any]
_KINDS = {
    "experiments": ("V2beta1Experiment", "experiment_id"),
    "pipelines": ("V2beta1Pipeline", "pipeline_id"),
    "versions": ("V2beta1PipelineVersion", "pipeline_version_id"),
    "runs": ("V2beta1Run", "run_id"),
    "recurringruns": ("V2beta1RecurringRun", "recurring_run_id"),
}
_LISTS = {"versions": "pipeline_versions", "recurringruns": "recurringRuns"}


class KfpServer(Double):
    """``with KfpServer() as server``: then a client of ``server.url`` finds nothing, and may make everything."""

    def __init__(self) -> None:
        self.kept: dict[str, dict[str, Json]] = {kind: {} for kind in _KINDS}
        self.packages: list[str] = []
        self.forbidden: set[str] = set()  # kinds that may not be made
        self.busy = 0  # so many requests are answered 503 first
        self.plays: list[list[tuple[str, dict[str, str]]]] = []  # of the next runs: (state, steps) by look
        self.requests: list[tuple[str, str]] = []
        self.token: str | None = None  # of all but the health check, where it is set
        super().__init__(_Handler)

    def all(self, kind: str) -> list[Json]:
        """What there is of a kind, oldest first."""
        return list(self.kept[kind].values())

    def play(self, run: Json, state: str, steps: dict[str, str]) -> None:
        """A run as it is now; ``steps`` are states by Argo's names."""
        run["state"] = state
        tasks = [{"display_name": name, "state": told, "run_id": run["run_id"]} for name, told in steps.items()]
        run["run_details"] = {"task_details": tasks}

    def make(self, kind: str, body: Json) -> tuple[int, Json]:
        model, identity = _KINDS[kind]
        if kind in self.forbidden:
            return 403, {"message": f"User 'nobody' is not authorized to create {kind}"}
        if "max_concurrency" in body:  # int64, of which protobuf reads numbers and strings, and the models strings
            body["max_concurrency"] = str(body["max_concurrency"])
        if problem := _differs(body, model):
            return 400, {"message": f"{model}: {problem}"}
        number = len(self.kept[kind]) + 1
        made = {**body, identity: f"{kind}-{number}", "created_at": f"2026-01-01T00:00:{number:02d}Z"}
        if kind == "runs":
            reference = body["pipeline_version_reference"]
            assert self.kept["versions"][reference["pipeline_version_id"]]["pipeline_id"] == reference["pipeline_id"]
            self._require_parameters(body["runtime_config"]["parameters"])
            self.play(made, "PENDING", {})
            made["_play"] = self.plays.pop(0) if self.plays else []
        self.kept[kind][made[identity]] = made
        return 200, made

    def look(self, kind: str, identity: str) -> tuple[int, Json]:
        found = self.kept[kind].get(identity)
        if found is None:
            return 404, {"message": f"{identity} not found"}
        if found.get("_play"):
            self.play(found, *found["_play"].pop(0))
        return 200, found

    def listed(self, kind: str, query: dict[str, str]) -> tuple[int, Json]:
        model, _ = _KINDS[kind]
        known = getattr(kfp_server_api, model).attribute_map.values()
        items = self.all(kind)
        for predicate in json.loads(unquote(query.get("filter") or "{}")).get("predicates", []):
            operation, key, value = (predicate[name] for name in ("operation", "key", "stringValue"))
            assert operation in (1, "EQUALS", "IS_SUBSTRING")  # as protobuf reads either
            assert key in known
            part = operation == "IS_SUBSTRING"
            items = [item for item in items if (value in item.get(key, "") if part else value == item.get(key))]
        if "experiment_id" in query:
            items = [item for item in items if item["experiment_id"] == query["experiment_id"]]
        if query.get("sort_by", "").endswith(" desc"):
            items = items[::-1]
        return 200, {_LISTS.get(kind, kind): items[: int(query.get("page_size") or 10)], "total_size": len(items)}

    def upload(self, query: dict[str, str], content_type: str, body: bytes) -> tuple[int, Json]:
        """A version: of a package with a pipeline's specification."""
        head = f"Content-Type: {content_type}\r\n\r\n".encode()
        (part,) = BytesParser().parsebytes(head + body).get_payload()  # type: ignore[misc]
        package = part.get_payload(decode=True).decode()  # type: ignore[union-attr]
        assert "pipelineInfo" in next(yaml.safe_load_all(package))
        self.packages.append(package)
        assert query["pipelineid"] in self.kept["pipelines"]
        return self.make("versions", {"display_name": query["name"], "pipeline_id": query["pipelineid"]})

    def _require_parameters(self, given: Json) -> None:
        """As the server does: each argument is a parameter of the version, and each without a default is given."""
        spec = next(yaml.safe_load_all(self.packages[-1]))
        assert given.keys() == spec["root"]["inputDefinitions"]["parameters"].keys()


class _Handler(Handler):
    double: KfpServer

    def respond(self) -> None:
        path, query, body = self.read()
        self.double.requests.append((self.command, path))
        token = self.double.token
        if token and not path.endswith("/healthz") and self.headers["Authorization"] != f"Bearer {token}":
            self.answer(401, {"message": "Request header error: there is no user identity header"})
        elif self.double.busy and self.command == "GET" and "/runs/" in path:
            self.double.busy -= 1
            self.answer(503, {"message": "the API server is starting"})
        else:
            self.answer(*self._route(path.removeprefix("/apis/v2beta1/"), query, body))

    def _route(self, path: str, query: dict[str, str], body: bytes) -> tuple[int, Json]:
        if path == "healthz":
            return 200, {"multi_user": False}
        if path == "pipelines/upload_version":
            return self.double.upload(query, self.headers["Content-Type"], body)
        path = re.sub(r"^pipelines/[^/]+/versions$", "versions", path)
        kind, _, identity = path.partition("/")
        if self.command == "DELETE":
            return 200, self.double.kept[kind].pop(identity) and {}
        if self.command == "POST":
            return self.double.make(kind, json.loads(body))
        return self.double.look(kind, identity) if identity else self.double.listed(kind, query)


def _differs(body: Json, model: str) -> str:
    """Why a body is not one of that model: what the model writes is not what it read. Empty where it is."""
    client = kfp_server_api.ApiClient()

    class Answer:
        data = json.dumps(body)

    try:
        again = client.sanitize_for_serialization(client.deserialize(Answer, model))
    except (ValueError, TypeError, AttributeError) as error:
        return str(error)
    return "" if again == body else f"{body} is read as {again}"
