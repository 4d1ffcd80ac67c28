"""Registered students as champions and as what is compared: found by name, trusted only as they were registered."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from teefusion.compare import compare, table
from teefusion.errors import RegistryError, SettingsError, UsageError
from teefusion.registry import find_champion, register
from teefusion.settings import Settings, load_settings
from teefusion.sources import pin
from teefusion.stages.evaluate import Judges, evaluate, evaluation_folder
from teefusion.stages.ingest import ingest
from teefusion.stages.targets import targets
from teefusion.stages.train import train
from teefusion.tracking import connect
from tests.conftest import make_tiny_teacher, tiny_overrides


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_teacher: Path, tiny_scorer: Path) -> dict[str, Any]:
    """Settings of a run that has trained a student for two steps."""
    folder = tmp_path_factory.mktemp("trained")
    prompts = [
        {"prompt": f"a {word} star {style}", "style": style} for word in "abcdefghijklmnop" for style in ("x", "y")
    ]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    values = tiny_overrides(folder, tiny_teacher, tiny_scorer, folder / "prompts.json") | {"train.steps": 2}
    settings = pin(load_settings(overrides=values))
    prompt_set = Path(ingest(settings).output)
    train(settings, prompt_set, targets(settings, prompt_set).output)
    return values


@pytest.fixture
def student(trained: dict[str, Any], tmp_path: Path) -> tuple[Settings, Path, Path]:
    """Settings, prompt set and student, in a work directory of the test's own."""
    shutil.copytree(trained["workdir"], tmp_path / "work", ignore=shutil.ignore_patterns("mlflow.db*"))
    settings = pin(load_settings(overrides=trained | {"workdir": tmp_path / "work"}))
    (folder,) = (tmp_path / "work" / "students").glob("*/student")
    return settings, Path(ingest(settings).output), folder


def crown(settings: Settings, folder: Path, **tags: str) -> int:
    """Register a folder and make it champion."""
    details, _ = register(settings, folder, {"gate": "passed"} | tags, "", {})
    connect(settings).set_registered_model_alias(details["name"], "champion", str(details["version"]))
    version: int = details["version"]
    return version


def copy_of(student: Path, to: Path) -> Path:
    """The same weights under another digest, as another training would have other weights."""
    shutil.copytree(student, to)
    (to / "note.txt").write_text("another")
    return to


def test_without_a_registry_or_an_alias_there_is_no_champion(student: tuple[Settings, Path, Path]) -> None:
    settings, _, folder = student
    assert find_champion(settings) is None
    assert not (settings.workdir / "mlflow.db").exists()  # looking makes no database
    register(settings, folder, {"gate": "passed"}, "", {})
    assert find_champion(settings) is None


def test_the_champion_is_a_row_of_the_evaluation_and_part_of_its_name(
    student: tuple[Settings, Path, Path], tmp_path: Path
) -> None:
    settings, prompts, folder = student
    alone = evaluation_folder(settings, prompts, folder)
    version = crown(settings, copy_of(folder, tmp_path / "crowned"))
    result = evaluate(settings, prompts, folder)
    assert result.output != str(alone)
    assert result.details["champion"]["version"] == str(version)
    assert result.details["scores"]["champion"] == result.details["scores"]["student"]  # the same weights
    assert result.details["gate"]["champion_intervals"]["overall"]["low"] == 0
    page = (Path(result.output) / "report.html").read_text()
    assert "Student minus champion, prompt by prompt." in page
    assert f"The champion is {settings.model_name} version {version}." in page

    crown(settings, folder)  # promoted itself, it is not compared with itself
    assert Judges.of(settings, folder).champion is None
    assert evaluation_folder(settings, prompts, folder) == alone
    unasked = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"champion": None})})
    assert find_champion(unasked) is None


def test_a_champion_that_is_not_what_was_registered_is_refused(
    student: tuple[Settings, Path, Path], tmp_path: Path
) -> None:
    settings, prompts, folder = student
    crowned = copy_of(folder, tmp_path / "crowned")
    crown(settings, crowned)
    (crowned / "note.txt").write_text("changed since")
    with pytest.raises(RegistryError, match="version 1 is not what was registered: the files at .* have digest"):
        evaluate(settings, prompts, folder)
    shutil.rmtree(crowned)
    with pytest.raises(RegistryError, match="The student folder .* is not there"):
        find_champion(settings)


def test_a_champion_whose_gate_did_not_pass_is_refused(student: tuple[Settings, Path, Path]) -> None:
    settings, _, folder = student
    crown(settings, folder, gate="failed")
    with pytest.raises(RegistryError, match=r"version 1, which may not be used: its gate did not pass"):
        find_champion(settings)


def test_students_teachers_and_versions_are_compared_in_one_report(
    student: tuple[Settings, Path, Path], tmp_path: Path
) -> None:
    settings, _, folder = student
    crown(settings, copy_of(folder, tmp_path / "crowned"))
    names = [settings.teacher.uri, str(folder), f"models:/{settings.model_name}@champion"]
    result = compare(settings, names)
    assert {letter: model["title"] for letter, model in result["models"].items()} == {
        "A": f"A: {Path(settings.teacher.uri).name}",
        "B": f"B: {folder.parent.name}",
        "C": f"C: {settings.model_name} 1",
    }
    assert result["nfe"] == {"A": 8, "B": 4, "C": 4}
    assert result["scores"]["B"] == result["scores"]["C"]
    assert set(result["intervals"]) == {"B", "C"}
    assert {len(points) for points in result["guidance_control"].values()} == {2}
    page = Path(result["report"]).read_text()
    assert "Comparison" in page
    assert "Passed" not in page
    assert len(table(result).splitlines()) == 1 + 3 + 2 + 1
    record = Path(result["report"]).parent / "comparison.json"
    written = record.stat().st_mtime_ns
    assert compare(settings, names)["scores"] == result["scores"]
    assert record.stat().st_mtime_ns == written  # found again


def test_what_cannot_be_compared_is_refused(student: tuple[Settings, Path, Path]) -> None:
    settings, _, folder = student
    with pytest.raises(UsageError, match="1 models were named: compare two or more"):
        compare(settings, [str(folder)])
    with pytest.raises(RegistryError, match="nothing has no version 1"):
        compare(settings, [str(folder), "models:/nothing/1"])


def test_the_bundled_arbiter_judges_no_other_teacher(student: tuple[Settings, Path, Path], tmp_path: Path) -> None:
    settings, prompts, folder = student
    toy = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"scorer": "bundled:shapes"})})
    with pytest.raises(SettingsError, match="evaluate.scorer is bundled:shapes, which can only judge the bundled"):
        evaluate(toy, prompts, folder)
    with pytest.raises(SettingsError, match="Name a real scorer"):
        compare(toy, [settings.teacher.uri, str(folder)])
    make_tiny_teacher(tmp_path / "teacher", seed=3)
    bundled = pin(load_settings(overrides={"teacher.name": str(tmp_path / "teacher"), "workdir": tmp_path / "w"}))
    with pytest.raises(SettingsError, match="prompts.source is bundled:shapes, captions of coloured shapes"):
        ingest(bundled)
    assert json.dumps(bundled.content())
