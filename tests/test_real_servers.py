"""The registry on what a team runs: MLflow on PostgreSQL, with and without basic auth, students in S3."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from teefusion.errors import RegistryError, TrackingError
from teefusion.files import read_json
from teefusion.registry import listing, resolve
from teefusion.registry.promotion import promote, rollback
from teefusion.settings import Settings
from teefusion.stages.register import register
from teefusion.storage import open_store
from teefusion.tracking import connect
from tests import postgres, s3
from tests.mlflow_server import ADMIN, mlflow_server
from tests.test_registry import evaluation

Make = Callable[..., Settings]
needs_postgres = pytest.mark.skipif(postgres.missing() is not None, reason=str(postgres.missing()))


@pytest.fixture(scope="module")
def s3_url() -> Iterator[str]:
    with s3.s3_server() as url:
        yield url


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    with postgres.postgres_server() as url:
        yield url


@pytest.fixture(scope="module")
def open_server(postgres_url: str, s3_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, database = tmp_path_factory.mktemp("open"), postgres.database(postgres_url, "open")
    variables = s3.ENVIRONMENT | {"MLFLOW_S3_ENDPOINT_URL": s3_url}
    with mlflow_server(folder, database=database, artifacts=f"s3://{s3.BUCKET}/open", **variables) as url:
        yield url


@pytest.fixture(scope="module")
def guarded_server(postgres_url: str, s3_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder, database = tmp_path_factory.mktemp("guarded"), postgres.database(postgres_url, "guarded")
    accounts = postgres.database(postgres_url, "accounts")
    variables = s3.ENVIRONMENT | {"MLFLOW_S3_ENDPOINT_URL": s3_url}
    stores = {"database": database, "artifacts": f"s3://{s3.BUCKET}/guarded", "auth_database": accounts}
    with mlflow_server(folder, **stores, **variables) as url:
        yield url


@pytest.fixture
def in_s3(monkeypatch: pytest.MonkeyPatch, s3_url: str) -> dict[str, Any]:
    """Settings and variables for the S3 server."""
    for name, value in (s3.ENVIRONMENT | {"MLFLOW_S3_ENDPOINT_URL": s3_url}).items():
        monkeypatch.setenv(name, value)
    return {"storage.endpoint_url": s3_url, "storage.addressing_style": "path"}


@pytest.fixture(scope="module")
def tiny_student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student folder that draws, of random weights."""
    from teefusion.fusion import make_fusion
    from teefusion.settings import TeacherSettings
    from teefusion.students import make_student, save_student
    from teefusion.teachers import load_teacher

    teacher = load_teacher(TeacherSettings(uri=str(tiny_teacher), max_sequence_length=0), device="cpu")
    folder = tmp_path_factory.mktemp("tiny") / "student"
    save_student(make_student(teacher.pipeline, make_fusion("paper"), max_sequence_length=0), folder)
    return folder


def other_student(folder: Path) -> Path:
    folder.mkdir()
    (folder / "model_index.json").write_text("{}")
    return folder


@needs_postgres
def test_from_student_to_picture_through_s3_and_back(
    make_settings: Make, open_server: str, in_s3: dict[str, Any], tiny_student: Path, tmp_path: Path
) -> None:
    where = in_s3 | {"mlflow.tracking_uri": open_server, "storage.uri": f"s3://{s3.BUCKET}/runs"}
    settings = make_settings(where | {"mlflow.model_name": "m"})
    verdict = evaluation(tmp_path / "e", passed=True)
    first = register(settings, tiny_student, verdict).details
    assert first["source"] == f"s3://{s3.BUCKET}/runs/models/{first['student_digest']}"
    promote(settings, "m", "1")
    elsewhere = make_settings(where | {"workdir": tmp_path / "elsewhere"})
    trusted = resolve("models:/m@champion", elsewhere)
    assert trusted.folder == tmp_path / "elsewhere" / "models" / first["student_digest"]
    assert read_json(trusted.folder / "model_index.json") == read_json(tiny_student / "model_index.json")
    assert register(settings, other_student(tmp_path / "other"), verdict).details["version"] == 2
    promote(settings, "m", "2")
    assert rollback(settings, "m").champion == "1"
    champions = [move["champion"] for move in listing.history(settings, "m")["moves"]]
    assert champions == ["1", "2", "1"]


@needs_postgres
def test_mlflow_itself_loads_the_champion_and_heeds_the_parameters(
    make_settings: Make,
    open_server: str,
    in_s3: dict[str, Any],
    tiny_student: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import mlflow
    import pandas
    from PIL import Image

    where = in_s3 | {"mlflow.tracking_uri": open_server, "storage.uri": f"s3://{s3.BUCKET}/runs"}
    settings = make_settings(where | {"mlflow.model_name": "drawn"})
    register(settings, tiny_student, evaluation(tmp_path / "e", passed=True))
    promote(settings, "drawn", "1")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", open_server)
    monkeypatch.setattr(mlflow.tracking._tracking_service.utils, "_tracking_uri", None)
    model = mlflow.pyfunc.load_model("models:/drawn@champion")
    prompts = pandas.DataFrame({"prompt": ["a star", "a ring"]})
    drawn = {
        name: model.predict(prompts, params={"guidance_scale": 4.0, "num_inference_steps": 2, "seed": 0} | changed)
        for name, changed in {
            "plain": {},
            "again": {},
            "guidance": {"guidance_scale": 1.5},
            "steps": {"num_inference_steps": 3},
            "seed": {"seed": 1},
        }.items()
    }
    assert [Image.open(io.BytesIO(png)).size for png in drawn["plain"]] == [(16, 16), (16, 16)]
    assert drawn["again"] == drawn["plain"]
    assert all(drawn[name] != drawn["plain"] for name in ("guidance", "steps", "seed"))


@needs_postgres
def test_files_that_changed_in_s3_are_refused_and_never_kept(
    make_settings: Make, open_server: str, in_s3: dict[str, Any], tmp_path: Path
) -> None:
    where = in_s3 | {"mlflow.tracking_uri": open_server, "storage.uri": f"s3://{s3.BUCKET}/runs"}
    settings = make_settings(where | {"mlflow.model_name": "changed"})
    student = other_student(tmp_path / "s")
    (student / "weights").write_text("some")
    source = register(settings, student, evaluation(tmp_path / "e", passed=True)).details["source"]
    open_store(source, settings.storage).write("weights", b"others")
    with pytest.raises(RegistryError, match="changed version 1 is not what was registered"):
        promote(settings, "changed", "1")
    assert list((settings.workdir / "models").iterdir()) == []
    open_store(source, settings.storage).write("weights", b"some")
    kept = resolve("models:/changed@challenger", settings).folder
    (kept / "weights").write_text("damaged on disk")
    assert (resolve("models:/changed@challenger", settings).folder / "weights").read_text() == "some"


@needs_postgres
def test_with_basic_auth_an_account_is_asked_for_and_its_name_goes_into_history(
    make_settings: Make, guarded_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings({"mlflow.tracking_uri": guarded_server, "mlflow.model_name": "m"})
    with pytest.raises(TrackingError, match=r"\(401\)\. Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"):
        connect(settings)
    for name, value in ADMIN.items():
        monkeypatch.setenv(name, value)
    details = register(settings, other_student(tmp_path / "s"), evaluation(tmp_path / "e", passed=True)).details
    assert details["source"].startswith("mlflow-artifacts:")
    promote(settings, "m", "1")
    assert resolve("models:/m@champion", settings).digest == details["student_digest"]
    assert listing.history(settings, "m")["moves"][0]["by"] == "admin"


@needs_postgres
def test_an_account_without_permission_is_told_so(
    make_settings: Make, guarded_server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.server.auth.client import AuthServiceClient

    settings = make_settings({"mlflow.tracking_uri": guarded_server, "mlflow.model_name": "kept"})
    for name, value in ADMIN.items():
        monkeypatch.setenv(name, value)
    verdict = evaluation(tmp_path / "e", passed=True)
    register(settings, other_student(tmp_path / "s"), verdict)
    another = other_student(tmp_path / "t"), verdict
    AuthServiceClient(guarded_server).create_user("reader", "another-long-password")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "reader")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "another-long-password")
    for command in (promote, lambda *_: register(settings, *another)):
        with pytest.raises(TrackingError, match=r"this account may not \(403\)"):
            command(settings, "kept", "1")
    assert listing.history(settings, "kept")["moves"] == []


@needs_postgres
def test_a_host_that_the_server_does_not_know_is_told_apart_from_permission(
    make_settings: Make, open_server: str
) -> None:
    elsewhere = open_server.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(TrackingError, match="refuses the host in mlflow.tracking_uri.*--allowed-hosts"):
        connect(make_settings({"mlflow.tracking_uri": elsewhere}))


class FailsLater(s3.FaultProxy):
    """Healthy, as long as nothing is asked of its database."""

    def fate(self) -> str:
        self.requests += 1
        return "forward" if self.requests == 1 else "500"


@needs_postgres
def test_a_server_that_fails_is_slow_or_is_down_is_told_with_the_setting(make_settings: Make, open_server: str) -> None:
    with s3.FaultProxy(open_server, errors=1.0, resets=0.0) as proxy:
        with pytest.raises(TrackingError, match="answers 50[03]: the server fails"):
            connect(make_settings({"mlflow.tracking_uri": proxy.url}))
        down = proxy.url
    failing = FailsLater(open_server, errors=0.0, resets=0.0)
    with failing, pytest.raises(TrackingError, match="The server failed, not the request: look at its log"):
        connect(make_settings({"mlflow.tracking_uri": failing.url}))
    slow = s3.FaultProxy(open_server, errors=0.0, resets=0.0, latency_s=2.0)
    with slow, pytest.raises(TrackingError, match=r"within 0\.5 s \(ReadTimeout\).*raise mlflow.timeout_s"):
        connect(make_settings({"mlflow.tracking_uri": slow.url, "mlflow.timeout_s": 0.5}))
    with pytest.raises(TrackingError, match=r"No MLflow server answers.*Start it; .* correct mlflow.tracking_uri"):
        connect(make_settings({"mlflow.tracking_uri": down}))
