"""One MLflow run for each run key, shared by the stages: parameters, metrics, pictures, tags.

The run is found again by its tag ``teefusion.run_key``, or adopted from ``MLFLOW_RUN_ID``. Reaching the server is
checked once, before anything is spent. From then on a thread sends the records in their order (``outbox.py``), so that
a server which is slow, or away for minutes, does not hold up what it tracks.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teefusion.errors import TrackingError
from teefusion.outbox import Outbox
from teefusion.settings import Settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from PIL.Image import Image

log = logging.getLogger(__name__)
RUN_KEY_TAG = "teefusion.run_key"
_MAX_PARAM_CHARS = 500


def is_main_rank() -> bool:
    """Whether this process speaks for its job; under torchrun one of them does."""
    return os.environ.get("RANK", "0") == "0"


def tracking_uri(settings: Settings) -> str:
    """The server, or SQLite in the workdir."""
    return settings.mlflow.tracking_uri or f"sqlite:///{settings.workdir.resolve() / 'mlflow.db'}"


def connect(settings: Settings) -> MlflowClient:
    """A client of a tracking server that answers. Raises TrackingError saying which setting to look at."""
    uri = tracking_uri(settings)
    check_server(settings)
    if uri.startswith("sqlite:///"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    # MLflow's own default is to try for minutes; a lost metric is not worth a stalled training.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(int(settings.mlflow.timeout_s) or 1))
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError  # MLflow's store lets them through

    logging.getLogger("mlflow").setLevel(logging.ERROR)
    logging.getLogger("alembic").setLevel(logging.ERROR)
    try:
        client = MlflowClient(uri, uri)
        client.search_experiments(max_results=1)
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).partition("\n")[0]
        raise TrackingError(
            f"MLflow's database {_shown(uri)} cannot be used: {reason}. If it is a file: no space left, or no "
            "permission to write there? Free some space, or set mlflow.tracking_uri, and run again."
        ) from error
    except (MlflowException, OSError, ValueError) as error:
        raise TrackingError(f"MLflow at {_shown(uri)} cannot be used: {error}. Check mlflow.tracking_uri.") from error
    return client


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

    def finish(self, *, failed: bool) -> None:
        """Mark the run as over."""
        self._put("the end of the run", "set_terminated", "FAILED" if failed else "FINISHED")

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
    from mlflow.exceptions import MlflowException

    adopted = os.environ.get("MLFLOW_RUN_ID")
    try:
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
    except (MlflowException, OSError) as error:
        raise TrackingError(f"MLflow at {_shown(tracking_uri(settings))} refused to open a run: {error}") from error


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
            f"No MLflow server answers at {_shown(uri)} within {timeout_s:g} s ({type(error).__name__}). Start it, "
            "correct mlflow.tracking_uri (TEEFUSION_MLFLOW__TRACKING_URI), or unset it to use SQLite in the workdir."
        ) from error
    if answer.status_code != 200:
        raise TrackingError(
            f"{_shown(uri)}/health answered {answer.status_code}: is mlflow.tracking_uri an MLflow server?"
        )


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
