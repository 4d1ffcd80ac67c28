"""One MLflow run for each run key, shared by the stages: parameters, metrics, pictures, tags.

The run is found again by its tag ``teefusion.run_key``, or adopted from ``MLFLOW_RUN_ID``. Reaching the server is
checked once, before anything is spent. From then on a thread sends the records in their order (``outbox.py``), so that
a server which is slow, or away for minutes, does not hold up what it tracks.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from teefusion.errors import NoVersionError, TrackingError
from teefusion.files import create_bytes
from teefusion.outbox import Outbox
from teefusion.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

log = logging.getLogger(__name__)
RUN_KEY_TAG = "teefusion.run_key"
_SQLITE = "sqlite:///"
_MAX_PARAM_CHARS = 500
# A refusal's status, in the words of MLflow's client and, for artifacts, of requests.
_STATUS = re.compile(r"(?:error code |^)(401|403|5\d\d)\b")


def is_main_rank() -> bool:
    """Whether this process speaks for its job; under torchrun one of them does."""
    return os.environ.get("RANK", "0") == "0"


def tracking_uri(settings: Settings) -> str:
    """The server, or SQLite in the workdir."""
    return settings.mlflow.tracking_uri or f"{_SQLITE}{settings.workdir.resolve() / 'mlflow.db'}"


def connect(settings: Settings) -> MlflowClient:
    """A client of a tracking server that answers. Raises TrackingError saying which setting to look at."""
    uri = tracking_uri(settings)
    check_server(settings)
    # MLflow's own default is to try for minutes; a lost metric is not worth a stalled training.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(settings.mlflow.timeout_s) or 1))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    with mlflow_errors(settings, "be used"):
        if uri.startswith(_SQLITE):
            _make_database(Path(uri.removeprefix(_SQLITE)))
        client = MlflowClient(uri, uri)
        client.search_experiments(max_results=1)
    return client


def _make_database(path: Path) -> None:
    """MLflow's tables in a file that gets its name when all are there; MLflow mends none that a full disk cut short."""
    if path.exists():
        return
    from mlflow import MlflowClient

    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".mlflow-") as folder:
        new = Path(folder) / path.name
        MlflowClient(f"{_SQLITE}{new}", f"{_SQLITE}{new}").search_experiments(max_results=1)
        create_bytes(path, new.read_bytes())


def has_registry(settings: Settings) -> bool:
    """Whether there is one to ask: looking into a local one that nobody wrote to yet would make it."""
    uri = tracking_uri(settings)
    return not uri.startswith(_SQLITE) or Path(uri.removeprefix(_SQLITE)).exists()


@contextlib.contextmanager
def mlflow_errors(settings: Settings, action: str, *, missing: str | None = None) -> Iterator[None]:
    """What MLflow raises within, as TrackingError saying which setting to look at ("MLflow at URI cannot ACTION").

    Where it says that something does not exist, NoVersionError with the words ``missing``, if there are any.
    """
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError  # MLflow's store lets them through

    uri = _shown(tracking_uri(settings))
    try:
        yield
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise TrackingError(
            f"MLflow's database {uri} cannot be used: {reason}. If it is a file: no space left, or no permission to "
            "write there? Free some space, or set mlflow.tracking_uri, and run again."
        ) from error
    except (MlflowException, OSError, ValueError) as error:
        # An alias or version that is not there, in the words of one store or of the other.
        if missing and getattr(error, "error_code", "") in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise NoVersionError(f"{missing} (in MLflow at {uri}). 'teefusion models' lists what there is.") from error
        raise TrackingError(f"MLflow at {uri} cannot {action}: {_advice(error, settings)}") from error


def _advice(error: Exception, settings: Settings) -> str:
    """What a server's refusal means, and the setting to look at."""
    text, code = str(error).rstrip("."), getattr(error, "error_code", "")
    refused = set(_STATUS.findall(text))
    if "Invalid Host header" in text:
        return (
            "the server refuses the host in mlflow.tracking_uri, against DNS rebinding. Start it with --allowed-hosts "
            "(MLFLOW_SERVER_ALLOWED_HOSTS) that lists this host and port, or use an address that it allows."
        )
    if code == "UNAUTHENTICATED" or refused & {"401"}:
        return (
            "it wants to know who you are (401). Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN."
        )
    if code == "PERMISSION_DENIED" or refused & {"403"}:
        return "this account may not (403). Have its administrator grant it, or set another MLFLOW_TRACKING_USERNAME."
    if "too many 5" in text or refused or code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE"):
        return f"{text}. The server failed, not the request: look at its log and database, and run again."
    timeout_s = settings.mlflow.timeout_s
    return f"{text}. Check mlflow.tracking_uri, and if the server is slow mlflow.timeout_s ({timeout_s:g})."


class Tracker:
    """Logs to the run of this run key; a disabled one (ranks above 0) does nothing. Call ``close`` at the end."""

    def __init__(self, client: MlflowClient | None, run_id: str, *, patience_s: float = 0.0) -> None:
        self._client = client
        self.run_id = run_id
        self._patience_s = patience_s
        self._outbox = Outbox()

    @classmethod
    def open(cls, settings: Settings, *, enabled: bool = True) -> Tracker:
        """Find or create the run. Raises TrackingError."""
        if not enabled:
            return cls(None, "")
        client = connect(settings)
        return cls(client, _find_or_create(client, settings), patience_s=settings.mlflow.flush_timeout_s)

    def log_params(self, params: dict[str, Any]) -> None:
        """Nested settings, flattened to dotted names. Already logged ones are left alone."""
        for name, value in _flatten(params).items():
            self._put(f"parameter {name}", "log_param", name, str(value)[:_MAX_PARAM_CHARS])

    def log_metrics(self, metrics: dict[str, float], *, step: int = 0) -> None:
        """Metrics of one step, with the time of this call; one that is sent twice is kept once."""
        if self._client is None:
            return
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._put(f"metrics of step {step}", "log_batch", metrics=batch)

    def log_image(self, picture: Image, name: str) -> None:
        """A picture as an artifact."""
        self._put(name, "log_image", picture, name)

    def log_file(self, path: Path) -> None:
        """A file as an artifact."""
        self._put(path.name, "log_artifact", str(path))

    def set_tags(self, tags: dict[str, Any]) -> None:
        """Tags of the run."""
        for name, value in tags.items():
            self._put(f"tag {name}", "set_tag", name, value)

    def finish(self, status: Literal["FINISHED", "FAILED", "KILLED"]) -> None:
        """Mark the run as over."""
        self._put("the end of the run", "set_terminated", status)

    def close(self) -> None:
        """Wait for what is not sent yet, ``mlflow.flush_timeout_s`` at most, and say what was not."""
        lost = self._outbox.close(self._patience_s)
        if lost:
            log.warning(
                "%d records did not reach MLflow (%s); the results in the workdir are complete.",
                len(lost),
                lost[0] if len(lost) == 1 else f"{lost[0]} to {lost[-1]}",
            )

    def _put(self, what: str, method: str, *arguments: Any, **options: Any) -> None:
        if self._client is not None:
            self._outbox.put(what, functools.partial(getattr(self._client, method), self.run_id, *arguments, **options))


def _find_or_create(client: MlflowClient, settings: Settings) -> str:
    adopted = os.environ.get("MLFLOW_RUN_ID")
    with mlflow_errors(settings, "open a run"):
        if adopted:
            return str(client.get_run(adopted).info.run_id)
        name = settings.mlflow.experiment
        experiment = client.get_experiment_by_name(name)
        local = settings.mlflow.tracking_uri is None
        location = (settings.workdir.resolve() / "mlartifacts").as_uri() if local else None
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(name, location)
        found = client.search_runs([experiment_id], f"tags.`{RUN_KEY_TAG}` = '{settings.run_key}'", max_results=1)
        if found:
            return str(found[0].info.run_id)
        run = client.create_run(
            experiment_id,
            run_name=f"{settings.teacher.name.replace('/', '-')}-{settings.run_key[:8]}",
            tags={RUN_KEY_TAG: settings.run_key, "teefusion.teacher": settings.teacher.name},
        )
        return str(run.info.run_id)


def check_server(settings: Settings) -> None:
    """Raise TrackingError if the tracking URI is a server that does not answer; a file needs no check."""
    uri, timeout_s = tracking_uri(settings), settings.mlflow.timeout_s
    if not uri.startswith(("http://", "https://")):
        return
    import requests

    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=timeout_s)
    except requests.RequestException as error:
        raise TrackingError(
            f"No MLflow server answers at {_shown(uri)} within {timeout_s:g} s ({type(error).__name__}). Start it; "
            "if it is slow, raise mlflow.timeout_s; correct mlflow.tracking_uri (TEEFUSION_MLFLOW__TRACKING_URI), or "
            "unset it to use SQLite in the workdir."
        ) from error
    if answer.status_code >= 500:
        raise TrackingError(
            f"MLflow at {_shown(uri)} answers {answer.status_code}: the server fails, or what stands before it does. "
            "Look at its log, and run again."
        )
    if answer.status_code != 200:
        raise TrackingError(
            f"{_shown(uri)}/health answered {answer.status_code}: is mlflow.tracking_uri an MLflow server?"
        )


def check_access(settings: Settings) -> str:
    """That the server answers and lets these credentials write; what was found. Takes requests alone, and no time.

    Raises TrackingError saying what to set.
    """
    uri, name = tracking_uri(settings), settings.mlflow.experiment
    check_server(settings)
    if not uri.startswith(("http://", "https://")):
        return _shown(uri)
    found = _call(settings, "GET", "experiments/get-by-name", params={"experiment_name": name})
    if found.status_code == 404:
        made = _call(settings, "POST", "experiments/create", json={"name": name})
        return f"{_shown(uri)}: experiment {name} made ({made.json().get('experiment_id', 'by another')})"
    tag = {"experiment_id": found.json()["experiment"]["experiment_id"], "key": "teefusion.preflight", "value": "done"}
    _call(settings, "POST", "experiments/set-experiment-tag", json=tag)
    return f"{_shown(uri)}: experiment {name} can be written"


def _call(settings: Settings, method: str, path: str, **options: Any) -> Any:
    """An answer of MLflow's REST API, one that there is no such thing (404) too. Raises TrackingError."""
    import requests

    uri, token = tracking_uri(settings), os.environ.get("MLFLOW_TRACKING_TOKEN")
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}") for name in ("USERNAME", "PASSWORD"))
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    login = (user or "", password or "") if user or password else None
    try:
        address, limit = f"{uri.rstrip('/')}/api/2.0/mlflow/{path}", settings.mlflow.timeout_s
        answer = requests.request(method, address, headers=headers, auth=login, timeout=limit, **options)
    except requests.RequestException as error:
        raise TrackingError(f"MLflow at {_shown(uri)} broke off ({type(error).__name__}). Try again.") from error
    if answer.ok or answer.status_code == 404 or "RESOURCE_ALREADY_EXISTS" in answer.text:
        return answer
    told = answer.text[:200].strip()
    advice = "Look at the server's log"
    if "Host header" in answer.text:
        advice = "Start the server with --allowed-hosts and the name and port in mlflow.tracking_uri"
    elif answer.status_code in (401, 403):
        advice = (
            "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD (on a cluster in the Secret of "
            "cluster.mlflow_secret), of an account that may edit the experiment"
        )
    raise TrackingError(f"MLflow at {_shown(uri)} answered {answer.status_code} to {path}: {told}. {advice}.")


def _shown(uri: str) -> str:
    """The URI without a password."""
    scheme, _, rest = uri.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
