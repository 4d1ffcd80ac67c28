"""The registry's commands as a person types them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from teefusion.cli import cli
from teefusion.settings import load_settings
from teefusion.tracking import connect
from tests.registered import add_version

LINEAGE = {
    "teacher": "shapes",
    "strategy": "w2sd",
    "teacher_revision": "abc",
    "code_commit": "def",
    "image": "i@sha256:0",
}


@pytest.fixture
def workdir(empty_registry: Path, tmp_path: Path) -> Path:
    """With versions 1 and 2 of model m, of which the gate of 2 did not pass."""
    client = connect(load_settings(overrides={"workdir": empty_registry}))
    scores = {"score_student_overall": "31.2500", "score_teacher_overall": "31.0000"}
    add_version(client, tmp_path, gate="passed", **LINEAGE, **scores)
    add_version(client, tmp_path, gate="failed")
    return empty_registry


def run(workdir: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli, [*arguments, "--workdir", str(workdir)])


def shown(workdir: Path, *arguments: str) -> Any:
    return json.loads(run(workdir, *arguments, "--json").stdout)


def test_promotion_shows_in_the_table_and_in_history(workdir: Path) -> None:
    assert run(workdir, "history", "m").stdout == "No version of m was promoted yet.\n"
    assert run(workdir, "promote", "m", "1").stdout == "Version 1 is now champion of m.\n"
    assert run(workdir, "promote", "m", "1").stdout == "Version 1 was already champion of m.\n"
    header, second, first = run(workdir, "models").stdout.splitlines()
    assert header.split() == ["model", "version", "aliases", "teacher", "strategy", "score", "teacher's", "gate", "age"]
    assert first.split()[:8] == ["m", "1", "champion", "shapes", "w2sd", "31.25", "31.00", "passed"]
    assert second.split()[:8] == ["m", "2", "-", "-", "-", "-", "-", "failed"]
    move = shown(workdir, "history", "m")["moves"][0]
    assert (move["champion"], move["action"], move["until"]) == ("1", "promote", None)


def test_a_refusal_exits_with_1_and_an_override_without_a_reason_with_2(workdir: Path) -> None:
    refused = run(workdir, "promote", "m", "2")
    assert refused.exit_code == 1
    assert 'teefusion promote m 2 --override "REASON"' in refused.stderr
    assert run(workdir, "promote", "m", "2", "--override", " ").exit_code == 2
    assert run(workdir, "promote", "m", "2", "--override", "for the demo").exit_code == 0
    assert "promote, overriding the gate: for the demo" in run(workdir, "history", "m").stdout
    assert "failed (overridden)" in run(workdir, "models", "m").stdout


def test_rollback_says_where_it_went(workdir: Path) -> None:
    run(workdir, "promote", "m", "1")
    run(workdir, "promote", "m", "2", "--override", "for the demo")
    assert run(workdir, "rollback", "m").stdout == "Version 1 is now champion of m.\n"
    assert shown(workdir, "models", "m")["versions"][1]["aliases"] == ["champion"]


def test_a_version_shows_where_it_came_from(workdir: Path) -> None:
    version = shown(workdir, "models", "m", "1")
    assert LINEAGE.items() <= version["lineage"].items()
    lines = [line.split() for line in run(workdir, "models", "m", "1").stdout.splitlines()]
    assert ["code_commit", "def"] in lines


def test_history_tells_of_an_alias_moved_by_hand(workdir: Path) -> None:
    run(workdir, "promote", "m", "1")
    connect(load_settings(overrides={"workdir": workdir})).set_registered_model_alias("m", "champion", "2")
    note = "The alias was moved by hand to version 2, which is refused: its gate did not pass (failed)."
    assert run(workdir, "history", "m").stdout.splitlines()[-1] == note


def test_a_model_that_is_not_there_is_named(workdir: Path) -> None:
    refused = run(workdir, "models", "n")
    assert refused.exit_code == 1
    assert "there is no registered model n" in refused.stderr
