"""The calls of the Kubernetes API that a TrainJob takes, through the official client.

Each is tried again while the API is away (``cluster.patience_s``), and a refusal becomes a ClusterError that says what
is missing. Answers stay the JSON they are: typed models would refuse what a newer server adds.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from kubernetes import client, config, watch
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from teefusion.errors import ClusterError
from teefusion.parameters import POD_VARIABLE
from teefusion.settings import ClusterSettings
from teefusion.trainjobs import GROUP, NODE, PLURAL, VERSION

log = logging.getLogger(__name__)
Json = dict[str, Any]
Answer = TypeVar("Answer")
_SERVICE_ACCOUNT_NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
_BUSY = frozenset({0, 429, 500, 502, 503, 504})
_FIRST_PATIENCE_S = 30.0  # before there is a job, nothing is lost by an error
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_NEEDED = (
    (GROUP, PLURAL, ("create", "get", "list", "watch", "delete")),
    (GROUP, "trainingruntimes", ("get",)),
    *(("", resource, ("get", "list")) for resource in ("pods", "events")),
    ("", "pods/log", ("get",)),
)
"""API group, resource, verbs."""
_RIGHTS = "a Role with " + ", ".join(
    f"{resource} ({f'{group}: ' if group else ''}{', '.join(verbs)})" for group, resource, verbs in _NEEDED
)


class Cluster:
    """One namespace. Raises ClusterError, where nothing else is said, for what the API refuses or never answers."""

    def __init__(self, options: ClusterSettings, *, api: Any = None) -> None:
        """``api`` is a client's; none is the service account's in a pod, and the kubeconfig's elsewhere."""
        self.options = options
        api, found = (api, None) if api is not None else _connect(options.context)
        self.namespace = options.namespace or found or "default"
        self._objects, self._core = client.CustomObjectsApi(api), client.CoreV1Api(api)
        self._trainjobs = {"group": GROUP, "version": VERSION, "namespace": self.namespace, "plural": PLURAL}

    def require_runtime(self) -> None:
        """Raises ClusterError where Trainer or the training runtime is not there."""
        name, kind = self.options.runtime, self.options.runtime_kind
        arguments = {"group": GROUP, "version": VERSION, "name": name, "plural": f"{kind.lower()}s"}
        if kind == "ClusterTrainingRuntime":
            call: Callable[..., Any] = self._objects.get_cluster_custom_object
        else:
            call = self._objects.get_namespaced_custom_object
            arguments["namespace"] = self.namespace
        try:
            self._ask(
                f"read {kind} {name}",
                lambda: call(**arguments, _request_timeout=self._timeout),
                pass_on={404} if kind == "TrainingRuntime" else {403, 404},
                patience_s=min(self.options.patience_s, _FIRST_PATIENCE_S),
            )
        except ApiException as error:
            if error.status == 403:
                return  # reading cluster-wide objects is seldom granted; creating the job will tell
            if _details(error).get("name") == name:
                raise ClusterError(
                    f"There is no {kind} {name!r} in {self._where(kind)}. Install the chart there, or name another one "
                    "in cluster.runtime and cluster.runtime_kind."
                ) from error
            raise self._no_trainer() from error

    def require_rights(self) -> None:
        """Raises ClusterError where this account may not manage TrainJobs here; what it may not read is told too."""
        access = client.AuthorizationV1Api(self._core.api_client)

        def allowed(group: str, verb: str, resource: str) -> bool:
            name, _, part = resource.partition("/")
            asked = {"namespace": self.namespace, "verb": verb, "group": group, "resource": name}
            review = {"spec": {"resourceAttributes": asked | ({"subresource": part} if part else {})}}
            action = f"ask whether it may {verb} {resource}"
            options = {"_preload_content": False, "_request_timeout": self._timeout}
            answer = self._ask(action, lambda: access.create_self_subject_access_review(review, **options))
            return bool(json.loads(answer.data)["status"]["allowed"])

        lacking = [
            f"{verb} {resource}"
            for group, resource, verbs in _NEEDED
            for verb in verbs
            if not allowed(group, verb, resource)
        ]
        if lacking:
            raise ClusterError(
                f"This account may not {', '.join(lacking)} in namespace {self.namespace}. Bind {_RIGHTS} to it by a "
                "RoleBinding there, as the chart does for kfp.service_account."
            )

    def create(self, manifest: Mapping[str, Any]) -> bool:
        """Whether the TrainJob was made; not where there is one of that name."""

        def call() -> Any:
            return self._objects.create_namespaced_custom_object(
                **self._trainjobs, body=manifest, _request_timeout=self._timeout
            )

        try:
            self._ask(f"create TrainJob {manifest['metadata']['name']}", call, pass_on={404, 409})
        except ApiException as error:
            if error.status == 409:
                return False
            if _details(error).get("kind") == "namespaces":
                raise ClusterError(
                    f"There is no namespace {self.namespace!r}. Create it, or name another in cluster.namespace."
                ) from error
            raise self._no_trainer() from error
        return True

    def look(self, name: str) -> tuple[Json | None, str]:
        """The TrainJob, none where there is none, and the version from which ``changes`` go on."""

        def call() -> Any:
            return self._objects.list_namespaced_custom_object(
                **self._trainjobs, field_selector=f"metadata.name={name}", _request_timeout=self._timeout
            )

        try:
            found = self._ask(f"read TrainJob {name}", call, pass_on={404})
        except ApiException as error:
            raise self._no_trainer() from error
        return next(iter(found["items"]), None), found["metadata"]["resourceVersion"]

    def changes(self, name: str, version: str, seconds: float) -> Iterator[Json]:
        """The TrainJob as it changes, for at most so long.

        Ends early where the connection breaks or the version has become too old (410): look again, and go on.
        """
        window = max(int(seconds), 1)
        stream = watch.Watch().stream(
            self._objects.list_namespaced_custom_object,
            **self._trainjobs,
            field_selector=f"metadata.name={name}",
            resource_version=version,
            timeout_seconds=window,
            _request_timeout=(self._timeout, window + self._timeout),
        )
        try:
            for event in stream:
                if event["type"] == "DELETED":
                    return
                yield event["object"]
        except (ApiException, HTTPError, OSError, ValueError) as error:
            # Whatever it was, the next look meets it again if it stays, and knows how to say it.
            log.debug("the watch of TrainJob %s broke off: %s", name, error)

    def delete(self, name: str, *, patience_s: float | None = None) -> None:
        """Delete the TrainJob with all it made, if it is there. It goes once its pods have gone (foreground).

        Otherwise its JobSet would live on for a moment, and a new job of this name would adopt it.
        """
        timeout_s = min(self._timeout, patience_s or self._timeout)

        def call() -> Any:
            return self._objects.delete_namespaced_custom_object(
                **self._trainjobs, name=name, propagation_policy="Foreground", _request_timeout=timeout_s
            )

        try:
            self._ask(f"delete TrainJob {name}", call, pass_on={404}, patience_s=patience_s)
        except ApiException:
            return

    def pods(self, name: str) -> list[Json]:
        """The TrainJob's pods, those of earlier attempts that are still kept too."""
        selector = f"jobset.sigs.k8s.io/jobset-name={name}"
        return self._list("pods", self._core.list_namespaced_pod, label_selector=selector)

    def warnings(self, name: str) -> list[Json]:
        """Warning events on the TrainJob and on what was made for it: their names begin with its own."""
        events = self._list("events", self._core.list_namespaced_event, field_selector="type=Warning")
        return [event for event in events if f"{event['involvedObject'].get('name', '')}-".startswith(f"{name}-")]

    def log_lines(self, pod: str, *, since_s: int | None = None) -> Iterator[str]:
        """Follow the training container's log, each line after its time stamp; ends where the connection does.

        Raises ApiException (400 while the container is not there yet, 404 once the pod has gone) and HTTPError.
        """
        yield from watch.Watch().stream(
            self._core.read_namespaced_pod_log,
            name=pod,
            namespace=self.namespace,
            container=NODE,
            timestamps=True,
            **({"since_seconds": since_s} if since_s else {}),
            _request_timeout=(self._timeout, 10 * self._timeout),  # a download may say nothing for minutes
        )

    def last_lines(self, pod: str, count: int) -> str:
        """The end of a pod's log; why there is none, where there is none."""
        try:
            answer = self._core.read_namespaced_pod_log(
                pod,
                self.namespace,
                container=NODE,
                tail_lines=count,
                _preload_content=False,
                _request_timeout=self._timeout,
            )
            return bytes(answer.data).decode(errors="replace").rstrip()
        except (ApiException, HTTPError) as error:
            return f"(its log cannot be read: {_message(error)})"

    def owner(self) -> Json | None:
        """Reference to the workflow that this pod is a step of, so that the job is deleted with the run; else none."""
        pod = os.environ.get(POD_VARIABLE)
        if not pod:
            return None
        try:
            found = self._ask(
                f"read pod {pod}",
                lambda: self._json(self._core.read_namespaced_pod, pod, self.namespace),
                pass_on={403, 404},
            )
        except ApiException as error:
            log.warning("no workflow will own the TrainJob, so it outlives a deleted run: %s", _message(error))
            return None
        for reference in found["metadata"].get("ownerReferences", []):
            if reference["kind"] == "Workflow":
                return {key: reference[key] for key in ("apiVersion", "kind", "name", "uid")}
        return None

    @property
    def _timeout(self) -> float:
        return self.options.request_timeout_s

    def _list(self, what: str, call: Callable[..., Any], **selectors: str) -> list[Json]:
        found = self._ask(f"list {what}", lambda: self._json(call, self.namespace, **selectors))
        items: list[Json] = found.get("items") or []
        return items

    def _json(self, call: Callable[..., Any], *arguments: str, **options: Any) -> Json:
        answer = call(*arguments, **options, _preload_content=False, _request_timeout=self._timeout)
        value: Json = json.loads(answer.data)
        return value

    def _ask(
        self,
        action: str,
        call: Callable[[], Answer],
        *,
        pass_on: set[int] | frozenset[int] = frozenset(),
        patience_s: float | None = None,
    ) -> Answer:
        """The answer. Raises ApiException for a status in ``pass_on``, ClusterError for any other that will stay."""
        end = time.monotonic() + (patience_s if patience_s is not None else self.options.patience_s)
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return call()
            except (ApiException, HTTPError, OSError) as error:
                if isinstance(error, ApiException) and error.status not in _BUSY:
                    if error.status in pass_on:
                        raise
                    raise self._refusal(action, error) from error
                if time.monotonic() + pause_s > end:
                    raise ClusterError(
                        f"The Kubernetes API does not answer (cannot {action} in namespace {self.namespace}): "
                        f"{_message(error)}. A TrainJob that was made goes on; running again joins it."
                    ) from error
                log.debug("cannot %s: %s; again in %.1f s", action, _message(error), pause_s)
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _refusal(self, action: str, error: ApiException) -> ClusterError:
        told = f"Kubernetes refuses to {action} in namespace {self.namespace}: {_message(error)}."
        if error.status == 401:
            return ClusterError(f"{told} The credentials are missing or have expired: renew the kubeconfig's.")
        # The authorizer says who cannot do what; webhooks and quotas, which answer 403 too, have other words.
        if error.status == 403 and " cannot " in _message(error):
            return ClusterError(f"{told} Bind {_RIGHTS} to that account by a RoleBinding in this namespace.")
        return ClusterError(f"{told} Correct the cluster.* settings, or what refuses them.")

    def _no_trainer(self) -> ClusterError:
        return ClusterError(
            f"This cluster has no TrainJobs ({GROUP}/{VERSION}). Install Kubeflow Trainer 2.2 or newer, or set "
            "cluster.launcher to 'here' and cluster.nodes to 1."
        )

    def _where(self, kind: str) -> str:
        return "this cluster" if kind == "ClusterTrainingRuntime" else f"namespace {self.namespace}"


def _connect(context: str | None) -> tuple[Any, str | None]:
    """A client, and the namespace that goes with its credentials. Raises ClusterError where there are none."""
    settings = client.Configuration()
    settings.retries = False  # `_ask` tries again, and knows for how long
    try:
        if context is None and _SERVICE_ACCOUNT_NAMESPACE.exists():
            config.load_incluster_config(client_configuration=settings)
            return client.ApiClient(settings), _SERVICE_ACCOUNT_NAMESPACE.read_text().strip()
        file = os.environ.get("KUBECONFIG")  # which the client itself reads only when it is imported
        config.load_kube_config(file, context=context, client_configuration=settings)
        contexts, active = config.list_kube_config_contexts(file)
        chosen = next((one for one in contexts if one["name"] == context), active)
        return client.ApiClient(settings), chosen["context"].get("namespace")
    except (config.ConfigException, OSError) as error:
        raise ClusterError(
            f"There is no way to a cluster: {error}. Run in a pod with a service account, or set KUBECONFIG and "
            "cluster.context."
        ) from error


def _body(error: Exception) -> Json:
    """The Status object that came with a refusal, empty where there is none."""
    try:
        value = json.loads(getattr(error, "body", None) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _details(error: Exception) -> Json:
    found: Json = _body(error).get("details") or {}
    return found


def _message(error: Exception) -> str:
    if isinstance(error, ApiException):
        return str(_body(error).get("message") or f"{error.status} {error.reason}").rstrip(".")
    return str(error)
