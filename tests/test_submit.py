"""Runs on Kubeflow Pipelines: submitted once, joined, followed, repeated, listed; refused with what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from teefusion.cli import cli
from teefusion.errors import SettingsError
from teefusion.parameters import settings_of
from teefusion.pipelines.submit import cron_of, plan
from teefusion.settings import load_settings
from tests.kfpserver import KfpServer


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    monkeypatch.setenv("HOME", str(tmp_path))  # kfp keeps a context there
    with KfpServer() as found:
        yield found


def call(server: KfpServer, *arguments: str, code: int = 0) -> Any:
    command, *rest = arguments
    done = CliRunner().invoke(
        cli, [command, "--json", "--endpoint", server.url, "--set", "kfp.poll_s=0.01", *rest], catch_exceptions=False
    )
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if done.stdout else done.stderr


def submit(server: KfpServer, *arguments: str, code: int = 0) -> Any:
    return call(server, "submit", *arguments, code=code)


def test_a_run_is_created_with_settings_that_its_steps_read_again(server: KfpServer) -> None:
    (run,) = submit(server, "--steps", "900", "--set", "gate.margin=0.02")["runs"]
    (made,) = server.all("runs")
    assert run["url"] == f"{server.url}/#/runs/details/{made['run_id']}"
    assert made["display_name"] == run["name"] == f"shapes-{run['run_key']}"
    assert made["service_account"] == "teefusion-runner"
    arguments = made["runtime_config"]["parameters"]
    assert arguments["train_steps"] == 900
    assert arguments["teacher_revision"].startswith("sha256:")
    read = settings_of(arguments)
    assert (read.train.steps, read.gate.margin) == (900, 0.02)


def test_a_version_is_uploaded_once_for_all_teachers_and_again_for_another_cluster(server: KfpServer) -> None:
    submit(server)
    submit(server, "--steps", "900", "--strategy", "w2sd")
    assert len(server.packages) == len(server.all("pipelines")) == 1
    submit(server, "--steps", "901", "--set", "cluster.memory_gb=64")
    assert len(server.packages) == 2
    assert len(server.all("runs")) == 3


def test_a_published_version_has_its_own_defaults_and_is_that_of_every_run(server: KfpServer) -> None:
    first, again = (call(server, "publish", "--steps", "900") for _ in range(2))
    assert (first["uploaded"], again["uploaded"]) == (True, False)
    assert again["version_id"] == first["version_id"]
    assert first["url"] == f"{server.url}/#/pipelines/details/pipelines-1/version/{first['version_id']}"
    assert call(server, "publish", "--steps", "901")["uploaded"] is True
    spec = next(yaml.safe_load_all(server.packages[1]))
    assert spec["root"]["inputDefinitions"]["parameters"]["train_steps"]["defaultValue"] == 901
    submit(server)
    assert len(server.packages) == len(server.all("versions")) == 2


@pytest.mark.parametrize("state", ["FAILED", "CANCELING"])
def test_a_run_at_work_is_joined_and_one_that_has_ended_or_is_about_to_is_not(server: KfpServer, state: str) -> None:
    first, again = (submit(server)["runs"][0] for _ in range(2))
    assert (first["attached"], again["attached"]) == (False, True)
    assert again["run_id"] == first["run_id"]
    server.play(server.all("runs")[0], state, {})
    assert submit(server)["runs"][0]["attached"] is False
    assert len(server.all("runs")) == 2


def test_waiting_follows_the_steps_to_the_end(server: KfpServer) -> None:
    server.plays = [
        [
            ("RUNNING", {"preflight-driver": "SUCCEEDED", "preflight": "RUNNING"}),
            ("RUNNING", {"preflight": "SUCCEEDED", "train-driver": "RUNNING"}),
            ("SUCCEEDED", {"preflight": "SUCCEEDED", "train": "SUCCEEDED", "register": "SKIPPED"}),
        ]
    ]
    server.busy = 1
    done = CliRunner().invoke(cli, ["submit", "--endpoint", server.url, "--set", "kfp.poll_s=0.01", "--wait"])
    assert done.exit_code == 0
    told = [line.partition("  ")[2] for line in done.stderr.splitlines() if "  " in line]
    assert [line for line in told if line.endswith(("ing", "ed")) and ": " in line] == [
        "preflight: running",
        "preflight: succeeded",
        "train: running",
        "train: succeeded",
        "register: skipped",
    ]


@pytest.mark.parametrize("state", ["FAILED", "CANCELED"])
def test_waiting_for_a_run_that_does_not_end_well_is_exit_code_1(server: KfpServer, state: str) -> None:
    server.plays = [[(state, {"preflight": "SUCCEEDED", "ingest": state})]]
    assert submit(server, "--wait", code=1)["runs"][0]["state"] == state


def test_a_list_of_teachers_is_one_run_each_and_one_bad_entry_keeps_none_back(
    server: KfpServer, tmp_path: Path, tiny_teacher: Path
) -> None:
    teachers = tmp_path / "teachers.yaml"
    local = f"- teacher: {tiny_teacher}\n- teacher: shapes\n- {{teacher: {{name: shapes}}, strategy: {{name: w2sd}}}}\n"
    teachers.write_text(local)
    bad, first, second = submit(server, "--teachers", str(teachers), "--steps", "77", code=2)["runs"]
    assert f"teacher.uri: {tiny_teacher}" in bad["error"]
    made = [run["runtime_config"]["parameters"] for run in server.all("runs")]
    assert [(one["strategy"], one["train_steps"]) for one in made] == [("euler_cfg", 77), ("w2sd", 77)]
    assert first["run_key"] != second["run_key"]
    assert len(server.packages) == 1


def test_a_dry_run_says_what_would_be_created_and_creates_nothing(server: KfpServer) -> None:
    (run,) = submit(server, "--dry-run")["runs"]
    assert server.requests == []
    assert run["arguments"]["teacher"] == "shapes"
    assert submit(server)["runs"][0] | {"version": run["version"], "name": run["name"]} == submit(server)["runs"][0] | {
        "attached": False
    }


def test_a_schedule_is_replaced_and_leaves_the_revision_to_each_run(server: KfpServer) -> None:
    for cron in ("0 3 * * 1", "30 0 4 * * 1"):
        made = call(server, "schedule", "--cron", cron)
    (kept,) = server.all("recurringruns")
    assert kept["trigger"] == {"cron_schedule": {"cron": "30 0 4 * * 1"}}
    assert (kept["max_concurrency"], kept["no_catchup"], kept["mode"]) == ("1", True, "ENABLE")
    assert kept["runtime_config"]["parameters"]["teacher_revision"] == ""
    assert (made["schedule"], made["replaced"]) == ("teefusion-shapes", 1)
    assert cron_of("0 3 * * 1") == "0 0 3 * * 1"
    with pytest.raises(SettingsError, match="has 2 fields"):
        cron_of("3 4")


def test_runs_are_listed_with_stage_and_verdict(server: KfpServer) -> None:
    plays = {
        "RUNNING": {
            "preflight": "SUCCEEDED",
            "targets": "SUCCEEDED",
            "target-workers": "RUNNING",
            "targets-2": "RUNNING",
        },
        "FAILED": {"preflight": "SUCCEEDED", "ingest": "FAILED", "summarize": "SUCCEEDED"},
        "SUCCEEDED": {"evaluate": "SUCCEEDED", "register": "SUCCEEDED", "summarize": "SUCCEEDED"},
    }
    for steps in range(4):
        submit(server, "--steps", str(steps + 1))
    for run, (state, steps_told) in zip(server.all("runs"), plays.items(), strict=False):
        server.play(run, state, steps_told)
    server.play(server.all("runs")[3], "SUCCEEDED", {"evaluate": "SUCCEEDED", "register": "SKIPPED"})
    rows = call(server, "runs")["runs"]
    assert [(row["teacher"], row["state"], row["stage"], row["verdict"]) for row in rows] == [
        ("shapes", "SUCCEEDED", "evaluate", "rejected"),
        ("shapes", "SUCCEEDED", "register", "registered"),
        ("shapes", "FAILED", "ingest", "failed"),
        ("shapes", "RUNNING", "targets", None),
    ]


def test_what_the_server_refuses_is_told_with_what_to_do(server: KfpServer) -> None:
    server.forbidden = {"runs"}
    (run,) = submit(server, code=1)["runs"]
    assert "not authorized to create runs" in run["error"]
    assert "Give credentials that may" in run["error"]


def test_a_server_that_is_not_there_is_told_at_once(server: KfpServer) -> None:
    done = CliRunner().invoke(cli, ["runs", "--endpoint", "http://127.0.0.1:9"])
    assert done.exit_code == 1
    assert "does not answer at http://127.0.0.1:9" in done.stderr


def test_a_branch_of_the_hub_becomes_a_commit_when_a_run_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    commits = {"main": "c0ffee"}
    monkeypatch.setattr("teefusion.sources.revision_of", lambda source: commits[source.revision])
    settings = load_settings(overrides={"teacher.name": "someone/teacher", "teacher.revision": "main"})
    assert plan(settings).arguments["teacher_revision"] == plan(settings).revision == "c0ffee"
    assert plan(settings, pinned=False).arguments["teacher_revision"] == "main"
    commits["main"] = "decaf"
    assert plan(settings).run_key != "c0ffee"


def test_the_workdir_of_a_run_is_on_the_volume() -> None:
    volume = {"cluster.volume_claim": "work", "cluster.volume_path": "/shared"}
    arguments = plan(load_settings(overrides=volume)).arguments
    assert json.loads(arguments["settings"])["workdir"] == "/shared/work"
    with pytest.raises(SettingsError, match=r"workdir: /elsewhere"):
        plan(load_settings(overrides=volume | {"workdir": "/elsewhere"}))
