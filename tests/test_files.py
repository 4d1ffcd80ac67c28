"""Files are whole or absent."""

from __future__ import annotations

import errno
import math
import os
from pathlib import Path

import pytest

from teefusion.errors import IntegrityError, StorageError
from teefusion.files import (
    canonical_json,
    content_key,
    publish_folder,
    read_json,
    sha256_file,
    sha256_folder,
    write_bytes,
    write_json,
)


def test_equal_content_has_one_spelling_and_one_key() -> None:
    assert canonical_json({"b": 1, "a": [1.5, "é"]}) == '{"a":[1.5,"é"],"b":1}'
    assert content_key({"a": 1, "b": 2}) == content_key({"b": 2, "a": 1}) != content_key({"a": 1, "b": 3})


def test_nan_has_no_canonical_form() -> None:
    with pytest.raises(ValueError, match="JSON"):
        canonical_json(math.nan)


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def full(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match=r"a\.json: no space left.*Free some space"):
        write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), publish_folder(tmp_path / "f") as folder:  # noqa: PT012
        (folder / "half").write_text("x")
        raise RuntimeError("killed")
    assert list(tmp_path.iterdir()) == []
    with publish_folder(tmp_path / "f") as folder:
        (folder / "whole").write_text("x")
        assert not (tmp_path / "f").exists()
    assert [item.name for item in (tmp_path / "f").iterdir()] == ["whole"]


def test_a_folder_digest_sees_names_and_contents(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").write_text("2")
    digest = sha256_folder(tmp_path)
    (tmp_path / "a").rename(tmp_path / "c")
    renamed = sha256_folder(tmp_path)
    (tmp_path / "c").rename(tmp_path / "a")
    assert sha256_folder(tmp_path) == digest != renamed
    (tmp_path / "b").write_text("3")
    assert sha256_folder(tmp_path) != digest


def test_a_file_digest_is_sha256(tmp_path: Path) -> None:
    write_bytes(tmp_path / "abc", b"abc")
    assert sha256_file(tmp_path / "abc").startswith("ba7816bf8f01cfea")


def test_broken_json_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"x\.json is not valid JSON"):
        read_json(tmp_path / "x.json")


def test_an_unwritable_place_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file/below"):
        write_bytes(tmp_path / "file" / "below", b"x")
