"""The wheel: what is in it, and what it does where nothing else is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.dockerfile import installs
from tests.repository import PROJECT, ROOT, SOURCES, files


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that neither ignored files nor an earlier build get in."""
    tree, output = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for path in files():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tree / path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = output.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_every_source_and_data_file_under_one_name(wheel: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"/".join([SOURCES[path.parts[0]], *path.parts[1:]]) for path in files() if path.parts[0] in SOURCES}
    assert names == expected
    assert {name.split("/")[0] for name in names} == {"teefusion"}


class CleanEnvironment:
    """A virtual environment that sees nothing of the one that runs the tests, and an empty folder to work in."""

    def __init__(self, folder: Path) -> None:
        self.cwd = folder / "empty"
        self.cwd.mkdir()
        self.bin = folder / "venv" / "bin"
        hidden = ("PYTHON", "VIRTUAL_ENV", "TEEFUSION_")
        self._variables = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
        self.run(sys.executable, "-m", "venv", str(folder / "venv"))

    def run(self, *command: str, timeout_s: int = 300, **variables: str) -> str:
        """Standard output of a command that must succeed."""
        done = subprocess.run(
            command,
            cwd=self.cwd,
            env=self._variables | variables,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{command}:\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}"
        return done.stdout

    def python(self, code: str) -> str:
        return self.run(str(self.bin / "python"), "-c", code)

    def teefusion(self, *arguments: str, timeout_s: int = 300, **variables: str) -> str:
        return self.run(str(self.bin / "teefusion"), *arguments, timeout_s=timeout_s, **variables)

    def install(self, wheel: Path, extras: str = "") -> None:
        constraints = str(ROOT / "constraints.txt")
        pip = (str(self.bin / "python"), "-m", "pip", "install", "--quiet", "--no-compile", "--constraint", constraints)
        self.run(*pip, f"{wheel}{extras}", timeout_s=1200)

    def install_as(self, stage: str, wheel: Path) -> None:
        """By the very commands of a stage of the Dockerfile, and of those below it."""
        constraints = str(ROOT / "constraints.txt")
        variables = {"PATH": f"{self.bin}:{os.environ['PATH']}", "PIP_ARGS": "--quiet --no-compile"}
        for command in installs(stage):
            here = command.replace("/opt/teefusion/constraints.txt", constraints)
            here = here.replace("$(ls /dist/*.whl)", str(wheel))
            self.run("sh", "-c", here, timeout_s=1200, **variables)


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanEnvironment]:
    """The wheel and nothing but its core dependencies."""
    folder = tmp_path_factory.mktemp("clean")
    environment = CleanEnvironment(folder)
    environment.install(wheel)
    yield environment
    shutil.rmtree(folder)  # with torch in it, too large for pytest to keep


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[CleanEnvironment]:
    """Nothing installed."""
    yield CleanEnvironment(tmp_path)
    shutil.rmtree(tmp_path / "venv")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_wheel_runs_the_small_steps_in_the_pipeline_image(wheel: Path, environment: CleanEnvironment) -> None:
    environment.install_as("pipeline", wheel)
    environment.teefusion("preflight", "--workdir", "out", "--set", "device=cpu")
    environment.teefusion("ingest", "--workdir", "out")
    student, evaluation = environment.cwd / "student", environment.cwd / "evaluation"
    student.mkdir()
    (student / "model_index.json").write_text("{}")
    scores = {"overall": {"mean": 31.0, "n": 8}}
    interval = {"n": 8, "reference_mean": 31.0, "student_mean": 31.0, "difference": 0.0, "low": -0.1, "high": 0.1}
    result = {
        "gate": {"passed": True, "reasons": [], "confidence": 0.95, "intervals": {"overall": interval}},
        "scores": {row: scores for row in ("unguided", "teacher", "student")},
        "nfe": {"teacher": 8.0, "student": 4.0},
        "guidance_residual": 0.125,
        "scorer": {"name": "tiny", "weights_sha256": "ab12"},
        "training": {"libraries": {"torch": "2.13.0"}},
    }
    evaluation.mkdir()
    (evaluation / "evaluation.json").write_text(json.dumps(result))
    environment.python(
        "from pathlib import Path\n"
        "from teefusion.components.runtime import run_stage\n"
        "from teefusion.settings import load_settings\n"
        "from teefusion.sources import pin\n"
        "settings = pin(load_settings(overrides={'workdir': Path('out')})).to_json()\n"
        f"run_stage('register', settings, student={str(student)!r}, evaluation={str(evaluation)!r})\n"
    )
    assert "torch==2.13.0" in (student / "requirements.txt").read_text().split()


# The two below share an environment, and the second adds to it: their order is part of the test.
@pytest.mark.slow
def test_wheel_answers_with_its_core_alone(clean: CleanEnvironment) -> None:
    assert clean.teefusion("--version").split()[-1] == PROJECT["project"]["version"]
    assert "run" in clean.teefusion("--help")
    specs = clean.python(
        "from importlib.util import find_spec as f\n"
        "print(*(name for name in ('components', 'pipelines', 'kfp', 'torch') if f(name)))"
    )
    assert specs.split() == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_wheel_compiles_the_pipeline_without_torch(clean: CleanEnvironment, wheel: Path) -> None:
    clean.install(wheel, "[pipeline]")
    answer = json.loads(clean.teefusion("compile", "--output", "x.yaml", "--json").splitlines()[-1])
    assert answer["output"] == "x.yaml"
    spec = next(yaml.safe_load_all((clean.cwd / "x.yaml").read_text()))
    assert {"ingest", "targets", "train", "evaluate", "register"} <= {
        name.removeprefix("exec-") for name in spec["deploymentSpec"]["executors"]
    }
    shared = ("--workdir", "/shared/w", "--set", "cluster.volume_claim=c", "--set", "cluster.volume_path=/shared")
    (planned,) = json.loads(clean.teefusion("submit", "--dry-run", "--json", *shared).splitlines()[-1])["runs"]
    assert planned["name"] == f"shapes-{planned['run_key']}"
    assert clean.python("import importlib.util; print(importlib.util.find_spec('torch'))").strip() == "None"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_serves_in_the_serve_image(wheel: Path, environment: CleanEnvironment) -> None:
    environment.install_as("serve", wheel)
    assert "--help" in environment.teefusion("serve", "--help")
    environment.python("import teefusion.serving.server")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_runs_the_pipeline_in_the_train_image(wheel: Path, environment: CleanEnvironment) -> None:
    environment.install_as("train", wheel)
    environment.python("import kfp, peft, deepspeed")
    torchrun = (str(environment.bin / "torchrun"), "--nproc-per-node", "1")
    assert "One rank of the training stage." in environment.run(*torchrun, "-m", "teefusion.training", "--help")
    tiny = {
        "TEEFUSION_STRATEGY__NUM_STEPS": "4",
        "TEEFUSION_TARGETS__TRAJECTORIES": "8",
        "TEEFUSION_TARGETS__HELDOUT_TRAJECTORIES": "4",
        "TEEFUSION_TARGETS__STATES_PER_TRAJECTORY": "2",
        "TEEFUSION_TRAIN__STEPS": "2",
        "TEEFUSION_TRAIN__BATCH_SIZE": "4",
        "TEEFUSION_EVALUATE__PROMPTS_PER_STYLE": "2",
        "TEEFUSION_EVALUATE__SWEEP_PROMPTS": "1",
    }
    environment.teefusion("run", "--workdir", "out", "--json", timeout_s=900, **tiny)
    summary = json.loads((environment.cwd / "out" / "summary.json").read_text())
    assert summary["gate"]["passed"] is False  # two steps teach nothing, and two prompts a style are no evidence
    assert summary["nfe"]["student"] * 2 == summary["nfe"]["teacher"]
    assert (environment.cwd / "out" / "report.html").is_file()
