"""Components as functions: what they hand on and leave for people, and how a failure is told and not repeated."""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes import client

from teefusion.cluster import Cluster
from teefusion.components.evaluate import evaluate
from teefusion.components.ingest import ingest
from teefusion.components.preflight import preflight
from teefusion.components.register import register
from teefusion.components.runtime import run_stage, run_summary
from teefusion.components.summarize import summarize
from teefusion.components.targets import targets
from teefusion.components.train import train
from teefusion.errors import StorageError
from teefusion.files import read_json
from teefusion.jobs import delete_orphans
from teefusion.parameters import arguments_of, settings_of
from teefusion.settings import Settings, settings_from_json
from teefusion.stages.summary import outcome_of
from teefusion.trainjobs import trainjob_name
from teefusion.workspace import Workspace
from tests.apiserver import NAMESPACE, ApiServer
from tests.conftest import LENIENT_GATE

Make = Callable[..., Settings]


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A component is a process of its own, and leaves its handlers behind."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class Artifact:
    """An output as kfp gives it."""

    def __init__(self, path: Path) -> None:
        self.path, self.metrics = str(path), {}  # type: ignore[var-annotated]

    def log_metric(self, name: str, value: float) -> None:
        self.metrics[name] = value


@pytest.mark.parametrize("outcome", ["rejected", "registered"])
def test_components_hand_on_settings_and_folders_and_leave_artifacts(
    make_settings: Make, tmp_path: Path, outcome: str
) -> None:
    settings = make_settings({"gate.max_guidance_residual": 1e-6} if outcome == "rejected" else LENIENT_GATE)
    arguments = arguments_of(settings)
    findings, metrics = Artifact(tmp_path / "findings.md"), Artifact(tmp_path / "metrics")
    told = preflight.python_func(**arguments, findings=findings)
    assert settings_from_json(told) == settings
    assert "| teacher | well |" in Path(findings.path).read_text()
    records = {name: Artifact(tmp_path / f"{name}.md") for name in ("ingest", "targets", "register")}
    prompts = ingest.python_func(told, records["ingest"])
    made = targets.python_func(told, prompts, records["targets"])
    assert f"\n| made | {made} |\n" in Path(records["targets"].path).read_text()
    student = train.python_func(told, prompts, made, metrics)
    assert metrics.metrics.keys() == {"guidance_residual"}
    report, verdict, scores = (Artifact(tmp_path / name) for name in ("report.html", "verdict.md", "scores"))
    passed = evaluate.python_func(told, prompts, student, str(tmp_path / "out" / "evaluation"), report, verdict, scores)
    assert passed is (outcome == "registered")
    folder = (tmp_path / "out" / "evaluation").read_text()
    assert Path(report.path).read_bytes() == (Path(folder) / "report.html").read_bytes()
    assert Path(verdict.path).read_text().startswith("## Gate passed" if passed else "## Gate NOT passed\n\n- ")
    assert scores.metrics.keys() == {"score_teacher", "score_student", "nfe_teacher", "nfe_student"}
    if passed:
        assert register.python_func(told, student, folder, records["register"]) == f"{settings.model_name}/1"
        assert "\n| version | 1 |\n| aliases | challenger |\n" in Path(records["register"].path).read_text()
        required = (Path(student) / "requirements.txt").read_text().split()
        assert f"torch=={importlib.metadata.version('torch').partition('+')[0]}" in required  # as training recorded
    record = Artifact(tmp_path / "summary.md")
    summarize.python_func(**arguments, status=SimpleNamespace(state="SUCCEEDED", error_message=""), record=record)
    told = Path(record.path).read_text()
    assert told.startswith(f"## Run {outcome}\n")
    assert re.search(r"^\| train \| \d+\.\d s \|$", told, re.MULTILINE)
    summary = read_json(settings.workdir / "summary.json")
    assert (summary["outcome"], summary["error"]) == (outcome, None)


def test_the_exit_handler_finds_the_run_that_preflight_pinned(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings()
    arguments = arguments_of(settings) | {"teacher_revision": ""}
    told = preflight.python_func(**arguments, findings=Artifact(tmp_path / "findings.md"))
    assert settings_of(arguments).run_key != settings.run_key == settings_from_json(told).run_key
    record = tmp_path / "summary.md"
    run_summary(arguments, str(record), state="FAILED", error="the node | of\nthe GPU was lost")
    assert "\n| error | the node \\| of the GPU was lost |\n" in record.read_text()
    summary = read_json(settings.workdir / "runs" / settings.run_key / "summary.json")
    assert (summary["outcome"], summary["error"]) == ("failed", "the node | of\nthe GPU was lost")


def test_a_step_takes_the_variables_that_its_namespace_adds(
    make_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"HF_HOME": "", "HF_ENDPOINT": "", "KFP_POD_NAME": "step"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TEEFUSION_CLUSTER__ENV", '{"HF_ENDPOINT": "https://hub.example.com"}')
    settings = make_settings({"cluster.volume_claim": "work", "cluster.volume_path": str(tmp_path)})
    told = preflight.python_func(**arguments_of(settings), findings=Artifact(tmp_path / "findings.md"))
    assert os.environ["HF_HOME"] == str(tmp_path / "hub")
    monkeypatch.setenv("HF_ENDPOINT", "")
    ingest.python_func(told, Artifact(tmp_path / "record.md"))
    assert os.environ["HF_ENDPOINT"] == "https://hub.example.com"


def test_a_users_mistake_is_not_tried_again_and_a_failure_is(
    make_settings: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings()
    workspace = Workspace(settings)
    workspace.start()
    calls: list[str] = []

    def stage(_: Settings) -> Any:
        calls.append("called")
        raise StorageError("the disk is full")

    monkeypatch.setattr("teefusion.stages.ingest.ingest", stage)
    workspace.fail("ingest", "the disk was full", 1)
    with pytest.raises(SystemExit):
        run_stage("ingest", settings.to_json())
    workspace.fail("ingest", "there is no such file", 2)
    with pytest.raises(SystemExit) as ended:
        run_stage("ingest", settings.to_json())
    assert ended.value.code == 2
    assert len(calls) == 1
    assert "there is no such file (An earlier attempt found this." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("state", "code", "outcome"),
    [("FAILED", 1, "failed"), ("FAILED", 143, "cancelled"), ("FAILED", 75, "cancelled"), ("CANCELLED", 1, "cancelled")],
)
def test_a_step_that_was_stopped_is_a_cancelled_run(make_settings: Make, state: str, code: int, outcome: str) -> None:
    workspace = Workspace(make_settings())
    workspace.start()
    workspace.fail("train", "why", code)
    assert outcome_of(workspace, state) == outcome


def test_a_trainjob_that_nobody_waits_for_is_deleted_and_others_are_left(make_settings: Make) -> None:
    with ApiServer() as server:
        settings = make_settings({"cluster.namespace": NAMESPACE})
        cluster = Cluster(settings.cluster, api=client.ApiClient(client.Configuration(host=server.url)))
        ended, other = (trainjob_name(stage, settings.run_key) for stage in ("targets", "train"))
        for name in (ended, other):
            server.create({"metadata": {"name": name}, "spec": {}})
        server.condition(ended, "Failed")
        server.jobs[other]["metadata"]["ownerReferences"] = [{"kind": "Workflow", "uid": "another"}]
        delete_orphans(cluster, settings.run_key)
        assert server.count("DELETE", "trainjobs") == 0
        del server.jobs[other]["metadata"]["ownerReferences"]
        delete_orphans(cluster, settings.run_key)
        assert server.count("DELETE", other) == 1
        assert server.count("DELETE", ended) == 0


def test_a_trainjob_is_deleted_also_where_the_summary_cannot_be_written(
    make_settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        volume = {"cluster.volume_claim": "work", "cluster.volume_path": str(tmp_path)}
        settings = make_settings({"cluster.namespace": NAMESPACE, "cluster.nodes": 2} | volume)
        Workspace(settings).start()
        (Workspace(settings).run / "summary.json").mkdir()  # where a file should go
        name = trainjob_name("train", settings.run_key)
        server.create({"metadata": {"name": name}, "spec": {}})
        with pytest.raises(SystemExit) as ended:
            run_summary(arguments_of(settings), str(tmp_path / "summary.md"), state="FAILED", error="the node was lost")
        assert ended.value.code == StorageError.exit_code
        assert server.count("DELETE", name) == 1


def test_a_step_that_is_stopped_ends_so_also_where_the_summary_cannot_be_written(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = make_settings()
    Workspace(settings).start()
    (Workspace(settings).run / "summary.json").mkdir()

    def stage(_: Settings) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("teefusion.stages.ingest.ingest", stage)
    with pytest.raises(SystemExit) as ended:
        run_stage("ingest", settings.to_json())
    assert ended.value.code == 128 + signal.SIGTERM
