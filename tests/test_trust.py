"""What may be loaded by a name: gate, digest, and what is said where they do not hold."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from teefusion.errors import RegistryError
from teefusion.files import sha256_folder
from teefusion.registry import TrustedModel, resolve, version_of
from teefusion.settings import Settings, load_settings
from teefusion.tracking import connect

Add = Callable[..., Path]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(overrides={"workdir": tmp_path / "work"})


@pytest.fixture
def add(settings: Settings, tmp_path: Path) -> Add:
    """Make the next version of model m, of a folder of its own, with these tags beside its digest."""
    client = connect(settings)
    client.create_registered_model("m")

    def make(**tags: str) -> Path:
        number = len(client.search_model_versions("name = 'm'")) + 1
        folder = tmp_path / f"student-{number}"
        folder.mkdir()
        (folder / "model_index.json").write_text(f'{{"version": {number}}}')
        client.create_model_version("m", str(folder), tags={"student_digest": sha256_folder(folder)} | tags)
        return folder

    return make


def test_a_version_whose_gate_passed_resolves_by_alias_and_by_number(settings: Settings, add: Add) -> None:
    folder = add(gate="passed")
    connect(settings).set_registered_model_alias("m", "champion", "1")
    expected = TrustedModel(folder, "m", "1", sha256_folder(folder))
    assert resolve("models:/m@champion", settings) == resolve("models:/m/1", settings) == expected
    assert version_of("models:/m@champion", settings) == "1"


@pytest.mark.parametrize(
    ("tags", "why"), [({}, "its gate did not run"), ({"gate": "failed"}, r"its gate did not pass \(failed\)")]
)
def test_an_alias_moved_by_hand_to_a_version_without_a_passed_gate_is_refused(
    settings: Settings, add: Add, tags: dict[str, str], why: str
) -> None:
    add(**tags)
    connect(settings).set_registered_model_alias("m", "champion", "1")
    for look in (resolve, version_of):
        with pytest.raises(RegistryError, match=f"{why}. Was it moved by hand.*'teefusion rollback m'"):
            look("models:/m@champion", settings)


def test_changed_files_are_refused_by_alias_and_by_number(settings: Settings, add: Add) -> None:
    (add(gate="passed") / "model_index.json").write_text("{}")
    connect(settings).set_registered_model_alias("m", "champion", "1")
    for uri in ("models:/m@champion", "models:/m/1"):
        with pytest.raises(RegistryError, match="m version 1 is not what was registered.*Restore the files"):
            resolve(uri, settings)


def test_an_override_accepts_the_files_it_saw_and_no_others(settings: Settings, add: Add) -> None:
    folder = add(gate="failed")
    (folder / "model_index.json").write_text("{}")
    override = f'{{"reason": "demo", "digest": "{sha256_folder(folder)}"}}'
    connect(settings).set_model_version_tag("m", "1", "override", override)
    connect(settings).set_registered_model_alias("m", "champion", "1")
    assert resolve("models:/m@champion", settings).folder == folder
    (folder / "model_index.json").write_text("[]")
    with pytest.raises(RegistryError, match="is not what was registered"):
        resolve("models:/m@champion", settings)


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("models:/m@champion", "m has no version with the alias champion"),
        ("models:/m/7", "m has no version 7"),
        ("models:/none@champion", "none has no version with the alias champion"),
        ("models:/m/latest", "write models:/NAME@alias or models:/NAME/VERSION"),
        ("nowhere", "There is no folder nowhere"),
        ("org/name", "cannot be had from the hub"),
    ],
)
def test_what_is_not_there_is_said(settings: Settings, add: Add, uri: str, message: str) -> None:
    with pytest.raises(RegistryError, match=message):
        resolve(uri, settings)


def test_a_version_registered_by_hand_is_refused(settings: Settings, tmp_path: Path) -> None:
    client = connect(settings)
    client.create_registered_model("m")
    client.create_model_version("m", str(tmp_path))
    with pytest.raises(RegistryError, match="m version 1 has no tag student_digest"):
        resolve("models:/m/1", settings)


def test_a_folder_is_what_it_is(settings: Settings, tmp_path: Path) -> None:
    assert resolve(str(tmp_path), settings) == TrustedModel(tmp_path)
    assert version_of(str(tmp_path), settings) is None
