"""Registration in a real MLflow: SQLite here, a server process over HTTP."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teefusion.errors import UsageError
from teefusion.files import write_json
from teefusion.settings import Settings
from teefusion.stages.register import register
from teefusion.tracking import Tracker, connect
from tests.mlflow_server import mlflow_server

pytestmark = pytest.mark.usefixtures("empty_registry")
Make = Callable[..., Settings]


def evaluation(folder: Path, *, passed: bool) -> Path:
    scores = {"overall": {"mean": 31.25, "standard_error": 0.1, "n": 8}}
    interval = {"n": 8, "reference_mean": 31.0, "student_mean": 31.25, "difference": 0.25, "low": -0.125, "high": 0.5}
    gate = {"passed": passed, "reasons": ["the student is below its teacher"], "confidence": 0.95}
    result = {
        "gate": gate | {"intervals": {"overall": interval}},
        "scores": {row: scores for row in ("unguided", "teacher", "student")},
        "nfe": {"teacher": 8.0, "student": 4.0},
        "guidance_residual": 0.125,
        "scorer": {"name": "tiny", "weights_sha256": "ab12"},
        "training": {
            "lineage": {"target_set": "cd34", "target_set_digest": "ef56"},
            "libraries": {"torch": "2.13.0", "diffusers": "0.42.0"},
        },
    }
    write_json(folder / "evaluation.json", result)
    return folder


def student(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    return folder


def test_a_passed_student_becomes_challenger_with_its_history_in_tags(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings({"mlflow.model_name": "m"})
    result = register(settings, student(tmp_path / "key" / "student"), evaluation(tmp_path / "e", passed=True))
    client = connect(settings)
    version = client.get_model_version_by_alias("m", "challenger")
    assert (result.reused, result.details["version"], version.version) == (False, 1, 1)
    assert version.source == str(tmp_path / "key" / "student")
    expected = {
        "gate": "passed",
        "teacher_revision": settings.teacher.revision,
        "strategy": "euler_cfg",
        "run_key": settings.run_key,
        "student_key": "key",
        "nfe_student": "4",
        "score_student_overall": "31.2500",
        "guidance_residual": "0.1250",
        "scorer_sha256": "ab12",
        "target_set_digest": "ef56",
        "image": "unknown",
    }
    assert expected.items() <= version.tags.items()
    assert "| overall | 8 | 31.00 | 31.25 | +0.25 | -0.12 to +0.50 |" in version.description
    rows = ("teacher", "licence", "data", "method", "forwards a picture", "code, image")
    assert all(f"\n| {row} | " in version.description for row in rows)
    assert all(f"\n## {part}\n" in version.description for part in ("Scores", "Gate: passed", "Limits", "Use"))


def test_a_student_is_registered_where_nothing_is_that_trained_it(
    make_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.metadata.Distribution.from_name

    def find_in_the_small_image(name: str) -> importlib.metadata.Distribution:
        if name in ("torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "sentencepiece"):
            raise importlib.metadata.PackageNotFoundError(name)
        return find(name)

    monkeypatch.setattr(importlib.metadata.Distribution, "from_name", find_in_the_small_image)
    folder = student(tmp_path / "s")
    register(make_settings(), folder, evaluation(tmp_path / "e", passed=True))
    required = (folder / "requirements.txt").read_text().split()
    assert {"torch==2.13.0", "diffusers==0.42.0", "pillow"} <= set(required)  # the record says nothing of pillow


def test_registering_again_makes_no_second_version(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings()
    folder, verdict = student(tmp_path / "s"), evaluation(tmp_path / "e", passed=True)
    register(settings, folder, verdict)
    again = register(settings, folder, verdict)
    assert (again.reused, again.details["version"]) == (True, 1)


def test_another_student_takes_the_alias(make_settings: Make, tmp_path: Path) -> None:
    settings, verdict = make_settings({"mlflow.model_name": "m"}), evaluation(tmp_path / "e", passed=True)
    register(settings, student(tmp_path / "s"), verdict)
    other = student(tmp_path / "t")
    (other / "more").write_text("x")
    assert register(settings, other, verdict).details["version"] == 2
    client = connect(settings)
    assert client.get_model_version_by_alias("m", "challenger").version == 2
    assert client.get_model_version("m", "1").aliases == []


def test_a_student_whose_gate_failed_is_refused_with_the_reasons(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings()
    with pytest.raises(UsageError, match="nothing is registered:\n  the student is below its teacher"):
        register(settings, student(tmp_path / "s"), evaluation(tmp_path / "e", passed=False))
    assert connect(settings).search_registered_models() == []


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """With SQLite and local artifacts."""
    with mlflow_server(tmp_path_factory.mktemp("server")) as url:
        yield url


def test_a_server_gets_the_student_uploaded_once(make_settings: Make, tmp_path: Path, server: str) -> None:
    settings = make_settings({"mlflow.tracking_uri": server})
    folder, verdict = student(tmp_path / "s"), evaluation(tmp_path / "e", passed=True)
    result = register(settings, folder, verdict)
    assert result.details["aliases"] == ["challenger"]
    assert result.details["source"].startswith("mlflow-artifacts:")
    run_id = Tracker.open(settings).run_id
    names = [item.path for item in connect(settings).list_artifacts(run_id, "student")]
    assert {"student/MLmodel", "student/model_index.json"} <= set(names)
    assert register(settings, folder, verdict).reused is True


def test_records_that_the_server_refuses_cost_nothing_else(
    make_settings: Make, server: str, caplog: pytest.LogCaptureFixture
) -> None:
    settings = make_settings({"mlflow.tracking_uri": server})
    tracker = Tracker(connect(settings), "a" * 32, patience_s=30)  # a run that nobody knows
    tracker.log_metrics({"loss": 1.0}, step=1)
    tracker.log_metrics({"loss": 0.5}, step=2)
    tracker.close()
    assert "2 records did not reach MLflow (metrics of step 1 to metrics of step 2)" in caplog.text
