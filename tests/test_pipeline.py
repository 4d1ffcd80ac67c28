"""The very pipeline that is compiled, run by kfp.local: both gate outcomes, failure, reuse, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import LENIENT_GATE, tiny_overrides


def teefusion(*arguments: str, env: dict[str, str] | None = None, limit: str = "") -> subprocess.CompletedProcess[str]:
    """The installed command in a process of its own; ``limit`` is a shell prefix such as ``ulimit -f 100;``."""
    command = [sys.executable, "-m", "teefusion.cli", *arguments]
    shell = ["bash", "-c", f'{limit} exec "$@"', "bash", *command] if limit else command
    return subprocess.run(shell, capture_output=True, text=True, env=os.environ | (env or {}), check=False, timeout=280)


@pytest.fixture
def options(tmp_path: Path, tiny_teacher: Path, tiny_scorer: Path, prompt_file: Path) -> list[str]:
    """Command-line options of a tiny run."""
    values = tiny_overrides(tmp_path, tiny_teacher, tiny_scorer, prompt_file)
    values.pop("workdir")
    return ["--workdir", str(tmp_path / "work")] + [
        part for key, value in values.items() for part in ("--set", f"{key}={json.dumps(value)}")
    ]


PASS = [part for rule, value in LENIENT_GATE.items() for part in ("--set", f"{rule}={value}")]
FAIL = ["--set", "gate.max_guidance_residual=0.000001"]


def tracked(work: Path, run_key: str) -> tuple[str, str]:
    """Status and outcome in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{work}/mlflow.db")
    (found,) = client.search_runs(
        [one.experiment_id for one in client.search_experiments()], f"tags.`teefusion.run_key` = '{run_key}'"
    )
    return found.info.status, found.data.tags["teefusion.outcome"]


def run(*arguments: str) -> dict[str, Any]:
    done = teefusion("run", "--json", *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    summary: dict[str, Any] = json.loads(done.stdout)
    return summary


def test_a_run_that_passes_registers_and_its_rerun_makes_nothing_anew(options: list[str], tmp_path: Path) -> None:
    summary = run(*options, *PASS)
    work = tmp_path / "work"
    assert json.loads((work / "summary.json").read_text()) == summary
    assert summary["gate"]["passed"] is True
    assert summary["model"]["version"] == 1
    assert summary["model"]["aliases"] == ["challenger"]
    assert summary["nfe"] == {"teacher": 8.0, "student": 4.0}
    assert set(summary["scores"]) == {"unguided", "teacher", "student"}
    assert set(summary["scores"]["student"]) == {"overall", "anime", "photo"}
    assert set(summary["stages"]) == {"ingest", "targets", "train", "evaluate", "register"}
    assert not any(stage["reused"] for stage in summary["stages"].values())
    assert (work / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert Path(summary["student"], "model_index.json").exists()

    again = run(*options, *PASS)
    assert all(stage["reused"] for stage in again["stages"].values())
    assert again["model"] == summary["model"]

    longer = run(*options, *PASS, "--set", "train.steps=8")
    reused = {name: stage["reused"] for name, stage in longer["stages"].items()}
    assert reused == {"ingest": True, "targets": True, "train": False, "evaluate": False, "register": False}
    assert longer["model"]["version"] == 2
    assert longer["run_key"] != summary["run_key"]


@pytest.mark.slow
def test_a_run_whose_gate_fails_ends_well_and_registers_nothing(options: list[str]) -> None:
    summary = run(*options, *FAIL)
    assert summary["gate"]["passed"] is False
    assert "learned too little guidance" in " ".join(summary["gate"]["reasons"])
    assert summary["model"]["version"] is None
    assert summary["model"]["aliases"] == []
    assert "register" not in summary["stages"]


@pytest.mark.slow
def test_a_failing_stage_ends_the_run_and_the_summary_says_why(options: list[str], tmp_path: Path) -> None:
    empty = tmp_path / "scorer"
    empty.mkdir()
    done = teefusion("run", *options, "--set", f"evaluate.scorer={empty}")
    assert done.returncode == 1
    assert "evaluate failed" in done.stderr
    assert f"{empty} is no scorer" in done.stderr
    assert "Traceback" not in done.stderr.split("evaluate failed")[-1]
    summary = json.loads((tmp_path / "work" / "summary.json").read_text())
    assert set(summary["stages"]) == {"ingest", "targets", "train"}
    assert f"evaluate: {empty} is no scorer" in summary["error"]
    assert summary["gate"] is None
    assert summary["outcome"] == "failed"
    assert tracked(tmp_path / "work", summary["run_key"]) == ("FAILED", "failed")


def test_what_is_wrong_is_found_before_anything_is_spent_and_all_at_once(options: list[str], tmp_path: Path) -> None:
    wrong = ["--set", "evaluate.scorer=/nowhere", "--set", "mlflow.tracking_uri=http://127.0.0.1:9"]
    done = teefusion("run", *options, *wrong)
    assert done.returncode == 1
    assert "preflight failed: 2 problems found before anything was spent" in done.stderr
    assert "/nowhere is no scorer" in done.stderr
    assert "No MLflow server answers at http://127.0.0.1:9" in done.stderr
    assert json.loads((tmp_path / "work" / "summary.json").read_text())["stages"] == {}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_no_process_and_the_word_cancelled(
    options: list[str], tmp_path: Path, number: int
) -> None:
    endless = [sys.executable, "-m", "teefusion.cli", "run", *options, "--set", "train.steps=100000"]
    run = subprocess.Popen(endless, stderr=subprocess.PIPE, text=True)
    assert run.stderr is not None
    for line in run.stderr:
        if "step," in line:
            break
    (step,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.send_signal(number)
    run.stderr.read()
    assert run.wait(timeout=60) == (130 if number == signal.SIGINT else 143)
    assert not Path(f"/proc/{step}").exists()
    summary = json.loads((tmp_path / "work" / "summary.json").read_text())
    assert summary["outcome"] == "cancelled"
    assert set(summary["stages"]) == {"ingest", "targets"}
    assert tracked(tmp_path / "work", summary["run_key"]) == ("KILLED", "cancelled")


@pytest.mark.slow
def test_a_second_teacher_uses_the_prompts_of_the_first(options: list[str], tmp_path: Path) -> None:
    from tests.conftest import make_tiny_teacher

    run(*options, *FAIL)
    make_tiny_teacher(tmp_path / "second", seed=1)
    second = run(*options, *FAIL, "--set", f"teacher.name={tmp_path / 'second'}")
    reused = {name: stage["reused"] for name, stage in second["stages"].items()}
    assert reused == {"ingest": True, "targets": False, "train": False, "evaluate": False}


@pytest.mark.slow
def test_targets_of_several_steps_are_one_set(options: list[str], tmp_path: Path) -> None:
    summary = run(*options, *FAIL, "--set", "targets.shard_groups=3", "--set", "targets.parallel_groups=2")
    assert summary["outcome"] == "rejected"
    assert tracked(tmp_path / "work", summary["run_key"]) == ("FINISHED", "rejected")
    assert summary["stages"]["targets"]["reused"] is False
    assert len(list((tmp_path / "work" / "targets").iterdir())) == 1
    log = (tmp_path / "work" / "runs" / summary["run_key"] / "pipeline.log").read_text()
    assert log.count("== targets") == 3  # two that make them, as kfp.local has no more at once, and one that finds them


def test_a_users_mistake_inside_a_stage_keeps_its_exit_code(options: list[str], tmp_path: Path) -> None:
    lonely = tmp_path / "lonely.txt"
    lonely.write_text("one prompt\n")
    done = teefusion("run", *options, "--set", f"prompts.source={lonely}")
    assert done.returncode == 2
    assert "ingest failed" in done.stderr


def test_compiled_yaml_is_deterministic_and_holds_the_stages_the_gate_and_the_summary(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    for path in (first, second):
        done = teefusion("compile", "--output", str(path))
        assert done.returncode == 0, done.stderr
    assert first.read_bytes() == second.read_bytes()
    spec = next(iter(yaml.safe_load_all(first.read_text())))
    tasks = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert {"preflight", "ingest", "targets", "train", "evaluate"} <= tasks.keys()
    (gate,) = [task for task in tasks.values() if "triggerPolicy" in task and "condition" in task["triggerPolicy"]]
    assert "evaluate-Output" in gate["triggerPolicy"]["condition"]
    assert spec["root"]["dag"]["tasks"]["summarize"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    defaults = {name: one["defaultValue"] for name, one in spec["root"]["inputDefinitions"]["parameters"].items()}
    assert (defaults["teacher"], defaults["train_steps"]) == ("shapes", 750)


def test_a_full_disk_leaves_nothing_that_a_later_run_trusts(options: list[str], tmp_path: Path) -> None:
    """Files are limited to 8 KiB, so neither shards nor MLflow's database fit; then the limit goes."""
    limit = "trap '' XFSZ; ulimit -f 8;"
    done = teefusion("targets", *options, limit=limit)
    assert done.returncode == 1
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "work").glob("targets/*/manifest.json"))
    assert teefusion("targets", *options).returncode == 0
