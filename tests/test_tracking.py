"""Records reach MLflow in their order, through an outage of the server, and nobody waits for them."""

from __future__ import annotations

import resource
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE

from teefusion import outbox
from teefusion.errors import TrackingError
from teefusion.files import plain_name
from teefusion.outbox import Outbox
from teefusion.settings import Settings
from teefusion.tracking import Tracker, connect
from tests.mlflow_server import mlflow_server
from tests.s3 import free_port

Make = Callable[..., Settings]
STYLES = ["photo", "photo & film", "sci-fi (80s)", "l'art", "70%", "oil+ink", "a//b", "..", "日本画"]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "_PAUSES_S", (0.01, 0.02))
    monkeypatch.setattr(outbox, "_LAST_PAUSE_S", 0.01)


class Server:
    """Takes records while it is up."""

    def __init__(self) -> None:
        self.up, self.taken, self.asked = threading.Event(), list[int](), threading.Event()

    def take(self, number: int) -> None:
        self.asked.set()
        if not self.up.is_set():
            raise ConnectionError("nobody is there")
        if number == 2:
            raise MlflowException("not a number", INVALID_PARAMETER_VALUE)
        self.taken.append(number)


def sent_to(server: Server) -> Outbox:
    box = Outbox()
    for number in range(5):
        box.put(f"record {number}", lambda number=number: server.take(number))  # type: ignore[misc]
    return box


def test_what_a_server_misses_it_gets_in_order_when_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    server = Server()
    box = sent_to(server)
    assert server.asked.wait(10)
    server.up.set()
    assert box.close(patience_s=10) == ["record 2"]  # which it refused
    assert server.taken == [0, 1, 3, 4]
    assert caplog.text.count("MLflow does not take records (nobody is there)") == 1


def test_the_end_waits_no_longer_than_it_was_told_and_says_what_is_left() -> None:
    assert sent_to(Server()).close(patience_s=0.05) == [f"record {number}" for number in range(5)]


def test_an_outbox_that_was_never_used_ends_at_once() -> None:
    assert Outbox().close(patience_s=10) == []


def test_a_full_disk_leaves_no_database_that_is_half_made(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings({"workdir": tmp_path / "new"})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200 << 10, before[1]))  # MLflow's first tables fit, not all
    try:
        with pytest.raises(TrackingError, match=r"mlflow\.db cannot be used: .* no space left"):
            connect(settings)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(settings.workdir.iterdir()) == []
    assert connect(settings).search_experiments()


@pytest.mark.slow
def test_a_server_that_is_stopped_and_started_has_every_metric(
    make_settings: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    port = free_port()
    with mlflow_server(tmp_path / "server", port) as url:
        settings = make_settings({"mlflow.tracking_uri": url, "mlflow.timeout_s": 2, "mlflow.flush_timeout_s": 60})
        tracker = Tracker.open(settings)
        tracker.log_metrics({"loss": 8.0}, step=0)
    for step in range(1, 8):
        tracker.log_metrics({"loss": 8.0 - step, "rate": 1.0}, step=step)
    with mlflow_server(tmp_path / "server", port):
        tracker.close()
        history = connect(settings).get_metric_history(tracker.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(step, 8.0 - step) for step in range(8)]
    assert "did not reach MLflow" not in caplog.text


def test_mlflow_takes_a_score_of_any_style(make_settings: Make) -> None:
    settings = make_settings()
    tracker = Tracker.open(settings)
    tracker.log_metrics({f"score/student/{plain_name(style)}": 1.0 for style in STYLES})
    tracker.close()
    client = connect(settings)
    version = client.create_model_version(client.create_registered_model("m").name, "source")
    for style in STYLES:
        client.set_model_version_tag("m", version.version, f"score_student_{plain_name(style)}", "1")
    (run,) = client.search_runs([client.get_experiment_by_name("teefusion").experiment_id])
    assert len(run.data.metrics) == len(STYLES)
