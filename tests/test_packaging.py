"""What is installed, from what, and what the repository may hold: wheel, pins, Dockerfile, tracked files."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# What `import teefusion` and `teefusion --help` must not wait for, nor need.
HEAVY = {"torch", "kfp", "diffusers", "transformers", "accelerate", "deepspeed", "mlflow", "boto3", "pyarrow"}
# Where packages of ours lie, and the names they install under.
SOURCES = {"teefusion": "teefusion", "components": "teefusion/components", "pipelines": "teefusion/pipelines"}
# What torch brings by itself in builds that are not for CPU; torch pins it.
CUDA_PACKAGES = ("nvidia-*", "cuda-*", "triton")


# --- imports ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "import teefusion",
        "import teefusion.cli",
        "import teefusion.cli as c; c.cli(['--help'], standalone_mode=False)",
        "import teefusion.settings, teefusion.errors",
    ],
)
def test_core_imports_neither_torch_nor_kfp(statement: str) -> None:
    code = f"import sys\n{statement}\nprint('LOADED', *sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(done.stdout.rpartition("LOADED ")[2].split())
    assert "teefusion" in loaded
    assert not loaded & HEAVY


def test_components_and_pipelines_import_under_the_projects_name(tmp_path: Path) -> None:
    code = (
        "import importlib.util as u, teefusion.components, teefusion.pipelines\n"
        "print(u.find_spec('components'), u.find_spec('pipelines'))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, f"run `make install-dev`: {done.stderr}"
    assert done.stdout.split() == ["None", "None"]


# --- pins ------------------------------------------------------------------------------------------------------------


def _constraint_lines() -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "constraints.txt").read_text().splitlines())
    return [line for line in lines if line]


def _pins() -> dict[str, Version]:
    pairs = (line.split("==") for line in _constraint_lines())
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def _requirements() -> list[Requirement]:
    """Everything that pyproject.toml names: build, core and extras. Without the extra that only gathers others."""
    project = PROJECT["project"]
    groups = [PROJECT["build-system"]["requires"], project["dependencies"], *project["optional-dependencies"].values()]
    every = [Requirement(text) for group in groups for text in group]
    return [requirement for requirement in every if requirement.name != project["name"]]


def test_constraints_pin_exact_public_versions_once() -> None:
    lines = _constraint_lines()
    malformed = [line for line in lines if not re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line)]
    assert malformed == []
    names = [canonicalize_name(line.partition("==")[0]) for line in lines]
    assert len(names) == len(set(names))


def test_no_constraint_names_a_package_that_breaks_the_environment() -> None:
    assert not {"torchvision", "hpsv2"} & _pins().keys()


def test_constraints_pin_each_requirement_within_its_range() -> None:
    pins = _pins()
    requirements = _requirements()
    unpinned = [str(wanted) for wanted in requirements if canonicalize_name(wanted.name) not in pins]
    assert unpinned == []
    outside = [str(wanted) for wanted in requirements if pins[canonicalize_name(wanted.name)] not in wanted.specifier]
    assert outside == []


def test_each_package_that_the_code_imports_is_declared() -> None:
    declared = {canonicalize_name(wanted.name) for wanted in _requirements()} | {"teefusion"}
    providers = importlib.metadata.packages_distributions()
    undeclared = set()
    for path in (path for folder in SOURCES for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names:
                if not {canonicalize_name(provider) for provider in providers.get(top, [top])} & declared:
                    undeclared.add(f"{path.relative_to(ROOT)}: {top}")
    assert undeclared == set()


def _with_dependencies(wanted: list[Requirement]) -> Iterator[tuple[str, str]]:
    """Name and version of each installed package that the requirements reach."""
    seen: set[tuple[str, str]] = set()
    queue = [(wish, extra) for wish in wanted for extra in ("", *wish.extras)]
    while queue:
        wish, extra = queue.pop()
        name = canonicalize_name(wish.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            found = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed here, such as DeepSpeed
        yield name, found.version
        for child in map(Requirement, found.requires or []):
            if child.marker is None or child.marker.evaluate({"extra": extra}):
                queue.extend((child, part) for part in ("", *child.extras))


def test_constraints_are_complete_and_are_what_is_installed() -> None:
    pins = _pins()
    differing = {
        name: (version, str(pins.get(name)))
        for name, version in _with_dependencies(_requirements())
        if not any(fnmatch.fnmatch(name, pattern) for pattern in CUDA_PACKAGES)
        and str(pins.get(name)) != Version(version).public
    }
    assert differing == {}, "installed and pinned versions differ; run `make install-dev`, or pin what is missing"


# --- Dockerfile ------------------------------------------------------------------------------------------------------


def _instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (INSTRUCTION, arguments), comments gone and continued lines joined."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in lines if line]


def _stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage by its name, the FROM line first."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for instruction, arguments in _instructions():
        if instruction == "FROM":
            current = stages.setdefault(arguments.split()[-1], [])
        if stages:
            current.append((instruction, arguments))
    return stages


def test_dockerfile_copies_only_what_exists_and_enters_the_context() -> None:
    copied = {
        source.removeprefix("./").rstrip("/")
        for instruction, arguments in _instructions()
        if instruction in {"COPY", "ADD"} and "--from=" not in arguments
        for source in arguments.split()[:-1]
        if not source.startswith("--")
    }
    assert copied
    assert [source for source in sorted(copied) if not (ROOT / source).exists()] == []
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed


def test_dockerfile_ends_each_running_stage_as_a_numeric_user() -> None:
    for stage in ("pipeline", "train", "serve"):
        users = [arguments for instruction, arguments in _stages()[stage] if instruction == "USER"]
        assert users[-1] == "1000:1000", stage


def test_dockerfile_gives_its_user_the_folder_it_starts_in() -> None:
    base = _stages()["base"]
    (made,) = (re.search(r"useradd --uid 1000 .*--create-home (\w+)", text) for kind, text in base if kind == "RUN")
    assert made is not None
    assert ("WORKDIR", f"/home/{made[1]}") in base
    everything_else = [stage for name, stage in _stages().items() if name not in ("build", "base")]
    assert not [text for stage in everything_else for kind, text in stage if kind in ("WORKDIR", "VOLUME", "COPY")]


def test_dockerfile_has_the_stages_that_the_chart_and_the_pipeline_name() -> None:
    templates = [path.read_text() for path in (ROOT / "charts" / "teefusion" / "templates").rglob("*.*")]
    named = {stage for text in templates for stage in re.findall(r'"stage" "(\w+)"', text)}
    assert named == {"pipeline", "train", "serve"} <= _stages().keys()


def test_dockerfile_pins_its_base_image() -> None:
    stages = _stages()
    defaults = dict(arguments.split("=", 1) for instruction, arguments in _instructions() if instruction == "ARG")
    for stage, instructions in stages.items():
        base = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], instructions[0][1].split()[0])
        if base not in stages:
            assert re.search(r":\d+\.\d+\.\d+-[\w-]+(@sha256:[0-9a-f]{64})?$", base), f"{stage}: {base}"
    assert ":latest" not in (ROOT / "Dockerfile").read_text()


def test_dockerfile_installs_under_the_constraints_and_by_known_extras() -> None:
    installs = [
        command.strip()
        for instruction, arguments in _instructions()
        if instruction == "RUN"
        for command in arguments.split("&&")
        if "pip install" in command
    ]
    assert installs
    assert [command for command in installs if "constraints.txt" not in command] == []
    extras = {
        name for command in installs for group in re.findall(r"\[([a-z,]+)\]", command) for name in group.split(",")
    }
    assert (
        {"pipeline", "steps", "train", "serve", "lora", "deepspeed"}
        == extras
        <= PROJECT["project"]["optional-dependencies"].keys()
    )


# --- the repository --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Files of the repository: tracked, or new and not ignored. Relative to the root."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [git, "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted({Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()})


def test_only_the_bundled_weights_are_large(files: list[Path]) -> None:
    large = [path for path in files if (ROOT / path).stat().st_size > 1_000_000]
    weights = [path for path in large if path.suffix == ".safetensors" and path.parts[:2] == ("teefusion", "shapes")]
    assert large == weights
    bundled = [path for path in files if path.parts[:2] == ("teefusion", "shapes")]
    assert sum((ROOT / path).stat().st_size for path in bundled) <= 20_000_000  # 15 MB of it the teacher


def test_no_file_names_a_folder_of_the_machine_it_was_written_on(files: list[Path]) -> None:
    machine_path = re.compile(r"(?<![\w.\-/}*])/(?:work|root)/\w")
    found = []
    for path in files:
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue  # binary
        found += [f"{path}: {match[0]}" for match in machine_path.finditer(text)]
    assert found == []


def test_each_package_of_the_tree_is_listed_for_installation(files: list[Path]) -> None:
    packages = {
        ".".join([*SOURCES[path.parts[0]].split("/"), *path.parts[1:-1]])
        for path in files
        if path.name == "__init__.py" and path.parts[0] in SOURCES
    }
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])


# --- the wheel -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(files: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that neither ignored files nor an earlier build get in."""
    tree, output = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for path in files:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, tree / path)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(output), str(tree)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = output.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_every_source_and_data_file_under_one_name(wheel: Path, files: list[Path]) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {"/".join([SOURCES[path.parts[0]], *path.parts[1:]]) for path in files if path.parts[0] in SOURCES}
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
        pip = (str(self.bin / "python"), "-m", "pip", "install", "--quiet", "--constraint", constraints)
        self.run(*pip, f"{wheel}{extras}", timeout_s=1200)


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CleanEnvironment]:
    """The wheel and nothing but its core dependencies."""
    folder = tmp_path_factory.mktemp("clean")
    environment = CleanEnvironment(folder)
    environment.install(wheel)
    yield environment
    shutil.rmtree(folder)  # with torch in it, too large for pytest to keep


# The four below share an environment, and each adds to it: their order is part of the test.
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
def test_wheel_serves_with_the_extras_of_its_image(clean: CleanEnvironment, wheel: Path) -> None:
    clean.install(wheel, "[train,serve]")
    assert "--help" in clean.teefusion("serve", "--help")
    clean.python("import teefusion.serving.server")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_wheel_runs_the_pipeline_from_an_empty_folder(clean: CleanEnvironment, wheel: Path) -> None:
    clean.install(wheel, "[pipeline,train,lora]")  # all of the image's but DeepSpeed, for which see `make test-zero`
    clean.python("import teefusion.training, teefusion.distillation, peft")
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
    clean.teefusion("run", "--workdir", "out", "--json", timeout_s=900, **tiny)
    summary = json.loads((clean.cwd / "out" / "summary.json").read_text())
    assert summary["gate"]["passed"] is False  # two steps teach nothing, and two prompts a style are no evidence
    assert summary["nfe"]["student"] * 2 == summary["nfe"]["teacher"]
    assert (clean.cwd / "out" / "report.html").is_file()
