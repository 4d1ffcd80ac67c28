"""What a student's record says of code, image and licence."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import teefusion
from teefusion import lineage
from teefusion.registry.card import licence_of


def test_the_commit_is_the_images_where_it_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEFUSION_COMMIT", "abc")
    assert lineage.code_commit() == "abc"


def test_the_commit_is_the_source_trees_elsewhere() -> None:
    git = ["git", "-C", str(Path(teefusion.__file__).parent), "rev-parse", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True)
    if head.returncode:
        pytest.skip("the sources are no git checkout")
    assert lineage.code_commit().removesuffix("-dirty") == head.stdout.strip()


def test_below_somebody_elses_repository_the_commit_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    (tmp_path / "__init__.py").touch()
    monkeypatch.setattr(lineage, "_PACKAGE", tmp_path)
    assert lineage.code_commit() == "unknown"


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: other\nlicense_name: stability-community\n---\n# Model", "stability-community"),
        ("---\nlicense: mit\n---\n", "mit"),
        ("# no front matter", "unknown (the teacher has no model card that says)"),
    ],
)
def test_a_students_licence_is_that_of_its_teachers_card(tmp_path: Path, card: str, licence: str) -> None:
    (tmp_path / "README.md").write_text(card)
    assert licence_of(str(tmp_path)) == licence


def test_the_bundled_teacher_has_the_licence_of_this_package() -> None:
    assert licence_of("bundled:shapes") == "Apache-2.0"
