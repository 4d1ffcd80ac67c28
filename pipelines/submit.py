"""Publish the pipeline on Kubeflow Pipelines, submit runs of it, follow them, repeat them, list them."""

import contextlib
import dataclasses
import hashlib
import io
import json
import logging
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import kfp_server_api
import requests
from kfp.client import KF_PIPELINES_SA_TOKEN_ENV, Client, ServiceAccountTokenVolumeCredentials
from urllib3.exceptions import HTTPError

from teefusion.errors import ClusterError, SettingsError
from teefusion.parameters import arguments_of, on_cluster
from teefusion.pipelines.compile import pipeline_yaml, version_of
from teefusion.pipelines.distill import DESCRIPTION
from teefusion.settings import KfpSettings, PipelineStep, Settings
from teefusion.sources import pin

log = logging.getLogger("teefusion.submit")
_STEPS = get_args(PipelineStep)
_ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
_TIMEOUT_S = 10.0
_PATIENCE_S = 600.0  # while a run is followed, for an API that is away; the run goes on without it


@dataclass(frozen=True)
class Plan:
    """A run as it would be created."""

    name: str
    """Teacher and run key: what is at work under this name is this very run."""
    run_key: str
    teacher: str
    revision: str | None
    pipeline: str
    version: str
    experiment: str
    arguments: dict[str, Any]
    text: str
    """IR YAML of the version."""

    @property
    def upload(self) -> str:
        """Name of the version when it is uploaded: its own, and a digest that tells other defaults apart."""
        return f"{self.version}-{hashlib.sha256(self.text.encode()).hexdigest()[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, without the YAML."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "text"}


def plan(settings: Settings, *, pinned: bool = True) -> Plan:
    """The run of these settings. With ``pinned``, what moves (a branch on the hub) is looked up now, once and for all.

    Raises SettingsError for paths that are not on the cluster, and what ``sources.pin`` raises.
    """
    text = pipeline_yaml(settings)
    loose = on_cluster(settings)
    settings = pin(loose, elsewhere=True) if pinned else loose
    teacher = Path(settings.teacher.name).name
    # Preflight digests the prompts: who repeats a run in Kubeflow's form may name others there.
    given = settings.model_copy(update={"prompts": loose.prompts, "targets": loose.targets})
    return Plan(
        name=f"{teacher}-{settings.run_key}",
        run_key=settings.run_key,
        teacher=settings.teacher.name,
        revision=settings.teacher.revision,
        pipeline=settings.kfp.pipeline,
        version=version_of(text),
        experiment=settings.kfp.experiment,
        arguments=arguments_of(given),
        text=text,
    )


class Kubeflow:
    """Kubeflow Pipelines in one namespace. Raises ClusterError for what it refuses or does not answer."""

    def __init__(self, options: KfpSettings) -> None:
        self.options = options
        if host := options.host or os.environ.get("KF_PIPELINES_ENDPOINT"):
            _require_answer(host)
        # kfp takes the variable by itself only where it is given no host.
        credentials = ServiceAccountTokenVolumeCredentials() if os.environ.get(KF_PIPELINES_SA_TOKEN_ENV) else None
        with _errors("connect"):
            self._client = Client(host=options.host, ui_host=options.ui_host, credentials=credentials)

    def publish(self, wanted: Plan) -> dict[str, Any]:
        """Upload the version with these very defaults, which Kubeflow's form then shows, or find it there."""
        with _errors(f"publish the pipeline {wanted.pipeline}"):
            pipeline = self._pipeline(wanted)
            found = self._found(pipeline, _equals(wanted.upload))
            version = found or self._upload(pipeline, wanted)
        url = self._url("pipelines", f"{pipeline}/version/{version}")
        return {"version_id": version, "url": url, "uploaded": found is None}

    def submit(self, wanted: Plan) -> dict[str, Any]:
        """Create the run, or find it at work; returns its id and URL, and whether it was found."""
        with _errors(f"create the run {wanted.name}"):
            experiment = self._experiment(wanted.experiment)
            run = self._at_work(wanted.name, experiment)
            attached = run is not None
            if run is None:
                pipeline, version = self._version(wanted)
                run = self._client.run_pipeline(
                    experiment,
                    wanted.name,
                    params=wanted.arguments,
                    pipeline_id=pipeline,
                    version_id=version,
                    service_account=self.options.service_account,
                )
        return {"run_id": run.run_id, "url": self._url("runs", run.run_id), "attached": attached}

    def schedule(self, wanted: Plan, name: str, cron: str) -> dict[str, Any]:
        """A recurring run of that name, in place of any older one; one run at a time, and none is made up for."""
        with _errors(f"create the schedule {name}"):
            experiment = self._experiment(wanted.experiment)
            pipeline, version = self._version(wanted)
            found = self._client.list_recurring_runs(experiment_id=experiment, filter=_equals(name), page_size=100)
            older = [one.recurring_run_id for one in found.recurring_runs or []]
            made = self._client.create_recurring_run(
                experiment,
                name,
                cron_expression=cron_of(cron),
                max_concurrency=1,
                no_catchup=True,
                params=wanted.arguments,
                pipeline_id=pipeline,
                version_id=version,
                service_account=self.options.service_account,
            )
            for one in older:
                self._client.delete_recurring_run(one)
        identity = made.recurring_run_id
        return {"recurring_run_id": identity, "url": self._url("recurringrun", identity), "replaced": len(older)}

    def runs(self, limit: int) -> list[dict[str, Any]]:
        """The newest runs: teacher, state, stage and verdict."""
        with _errors("list runs"):
            experiment = self._experiment(self.options.experiment)
            found = self._client.list_runs(experiment_id=experiment, page_size=limit, sort_by="created_at desc")
        return [_row(run) | {"url": self._url("runs", run.run_id)} for run in found.runs or []]

    def wait(self, run_id: str) -> str:
        """Follow a run to its end, telling what its steps do; returns its state."""
        told: dict[str, str] = {}
        answered = time.monotonic()
        while True:
            try:
                with _errors(f"read run {run_id}"):
                    run = self._client.get_run(run_id)
                answered = time.monotonic()
                for step, state in steps_of(run).items():
                    if told.get(step) != state:
                        log.info("%s: %s", step, state.lower())
                        told[step] = state
                if run.state in _ENDED:
                    return str(run.state)
            except ClusterError as error:
                if time.monotonic() - answered > _PATIENCE_S:
                    raise
                log.debug("%s", error)
            time.sleep(self.options.poll_s)

    def _experiment(self, name: str) -> str:
        found = self._client.create_experiment(name, namespace=self.options.namespace)  # or the one that is there
        return str(found.experiment_id)

    def _at_work(self, name: str, experiment: str) -> Any:
        found = self._client.list_runs(experiment_id=experiment, filter=_equals(name), sort_by="created_at desc")
        return next((run for run in found.runs or [] if run.state not in _ENDED | {"CANCELING"}), None)

    def _version(self, wanted: Plan) -> tuple[str, str]:
        """Ids of the pipeline and of its version, with whatever defaults; uploaded if it is new."""
        pipeline = self._pipeline(wanted)
        return pipeline, self._found(pipeline, _named("IS_SUBSTRING", wanted.version)) or self._upload(pipeline, wanted)

    def _pipeline(self, wanted: Plan) -> str:
        found = self._client.list_pipelines(filter=_equals(wanted.pipeline), namespace=self.options.namespace)
        if found.pipelines:
            return str(found.pipelines[0].pipeline_id)
        new = kfp_server_api.V2beta1Pipeline(
            display_name=wanted.pipeline, description=DESCRIPTION, namespace=self.options.namespace
        )
        return str(self._client.pipelines.pipeline_service_create_pipeline(new).pipeline_id)

    def _found(self, pipeline: str, named: str) -> str | None:
        versions = self._client.list_pipeline_versions(pipeline, filter=named).pipeline_versions
        return str(versions[0].pipeline_version_id) if versions else None

    def _upload(self, pipeline: str, wanted: Plan) -> str:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "pipeline.yaml"
            file.write_text(wanted.text)
            made = self._client.upload_pipeline_version(str(file), wanted.upload, pipeline_id=pipeline)
        log.info("version %s of pipeline %s uploaded", wanted.upload, wanted.pipeline)
        return str(made.pipeline_version_id)

    def _url(self, what: str, identity: str) -> str:
        return f"{self._client._get_url_prefix()}/#/{what}/details/{identity}"


def cron_of(text: str) -> str:
    """Kubeflow's cron has six fields, seconds first; the usual five are taken at second 0. Raises SettingsError."""
    fields = text.split()
    if len(fields) not in (5, 6):
        raise SettingsError(f"--cron {text!r} has {len(fields)} fields. Write five, as in '0 3 * * 1', or six.")
    return " ".join(["0", *fields][-6:])


def steps_of(run: Any) -> dict[str, str]:
    """State of each of the pipeline's steps that has begun, in their order; of a fan-out's, one that is not done.

    Kubeflow lists a step's driver beside it, before the step itself is there.
    """
    states: dict[str, str] = {}
    for task in (run.run_details and run.run_details.task_details) or []:
        name, driver = (task.display_name or "").partition("-")[0], (task.display_name or "").endswith("-driver")
        known = states.get(name, "SUCCEEDED")
        if name in _STEPS and task.state and known in ("SUCCEEDED", "SKIPPED"):
            if driver and (name in states or task.state == "SUCCEEDED"):
                continue
            states[name] = str(task.state)
    return {step: states[step] for step in _STEPS if step in states}


def _row(run: Any) -> dict[str, Any]:
    steps = {step: state for step, state in steps_of(run).items() if state != "SKIPPED" and step != "summarize"}
    parameters = (run.runtime_config and run.runtime_config.parameters) or {}
    return {
        "run_id": run.run_id,
        "name": run.display_name,
        "teacher": parameters.get("teacher") or run.display_name.rpartition("-")[0],
        "strategy": parameters.get("strategy"),
        "created_at": run.created_at.isoformat(timespec="seconds") if run.created_at else None,
        "state": run.state,
        "stage": next(reversed(steps), None),
        "verdict": _verdict(run.state, steps),
    }


def _verdict(state: str, steps: dict[str, str]) -> str | None:
    """As ``summary.outcome_of`` says it, from the states of the steps; none while a run goes on."""
    if state == "SUCCEEDED":
        return "registered" if steps.get("register") == "SUCCEEDED" else "rejected"
    return {"FAILED": "failed", "CANCELED": "cancelled"}.get(state)


def _equals(name: str) -> str:
    return _named("EQUALS", name)


def _named(operation: str, name: str) -> str:
    return json.dumps({"predicates": [{"operation": operation, "key": "display_name", "stringValue": name}]})


def _require_answer(host: str) -> None:
    """Ask once: kfp's client would try for half a minute, and log every time."""
    try:
        requests.get(f"{host.rstrip('/')}/apis/v2beta1/healthz", timeout=_TIMEOUT_S)
    except requests.RequestException as error:
        raise ClusterError(
            f"Kubeflow Pipelines does not answer at {host} ({type(error).__name__}). Correct kfp.host (--endpoint), or "
            "forward its port: kubectl port-forward --namespace kubeflow svc/ml-pipeline-ui 8080:80"
        ) from error


@contextlib.contextmanager
def _errors(action: str) -> Iterator[None]:
    """What kfp's client raises, as ClusterError; what it prints would be part of our output."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except kfp_server_api.ApiException as error:
        told = _message(error)
        advice = "Correct the kfp.* settings"
        if error.status in (401, 403):
            advice = "Give credentials that may (kfp's KF_PIPELINES_ variables), and the namespace (kfp.namespace)"
        raise ClusterError(f"Kubeflow Pipelines refuses to {action} ({error.status}): {told}. {advice}.") from error
    except (HTTPError, OSError, TimeoutError, ValueError) as error:
        raise ClusterError(
            f"Cannot {action} in Kubeflow Pipelines: {error}. Check kfp.host and the network."
        ) from error


def _message(error: Any) -> str:
    try:
        return str(json.loads(error.body)["message"]).rstrip(".")
    except (TypeError, ValueError, KeyError):
        return str(error.reason)
