"""What importing takes, what is installed and pinned, and what the repository may hold."""

from __future__ import annotations

import ast
import fnmatch
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.repository import PROJECT, ROOT, SOURCES, files

# What `import teefusion` and `teefusion --help` must not wait for, nor need.
HEAVY = {"torch", "kfp", "diffusers", "transformers", "accelerate", "deepspeed", "mlflow", "boto3", "pyarrow"}
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


# --- the repository --------------------------------------------------------------------------------------------------


def test_only_the_bundled_weights_are_large() -> None:
    large = [path for path in files() if (ROOT / path).stat().st_size > 1_000_000]
    weights = [path for path in large if path.suffix == ".safetensors" and path.parts[:2] == ("teefusion", "shapes")]
    assert large == weights
    bundled = [path for path in files() if path.parts[:2] == ("teefusion", "shapes")]
    assert sum((ROOT / path).stat().st_size for path in bundled) <= 20_000_000  # 15 MB of it the teacher


def test_no_file_names_a_folder_of_the_machine_it_was_written_on() -> None:
    machine_path = re.compile(r"(?<![\w.\-/}*])/(?:work|root)/\w")
    found = []
    for path in files():
        try:
            text = (ROOT / path).read_text()
        except UnicodeDecodeError:
            continue  # binary
        found += [f"{path}: {match[0]}" for match in machine_path.finditer(text)]
    assert found == []


def test_each_package_of_the_tree_is_listed_for_installation() -> None:
    packages = {
        ".".join([*SOURCES[path.parts[0]].split("/"), *path.parts[1:-1]])
        for path in files()
        if path.name == "__init__.py" and path.parts[0] in SOURCES
    }
    assert packages == set(PROJECT["tool"]["setuptools"]["packages"])
