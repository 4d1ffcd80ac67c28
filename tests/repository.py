"""The repository: its root, its project file, its files."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# Where packages of ours lie, and the names they install under.
SOURCES = {"teefusion": "teefusion", "components": "teefusion/components", "pipelines": "teefusion/pipelines"}


@functools.cache
def files() -> list[Path]:
    """Files of the repository: tracked, or new and not ignored. Relative to the root. Skips without git."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = [git, "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return sorted({Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file()})
