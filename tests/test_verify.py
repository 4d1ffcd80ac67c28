"""Stored sets are checked to the last bit, and mended to the same bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from teefusion.errors import IntegrityError
from teefusion.manifests import Manifest, read_manifest
from teefusion.prompts import load_prompt_set
from teefusion.settings import Settings
from teefusion.shards import read_tensors
from teefusion.stages.ingest import ingest
from teefusion.storage import FolderStore
from teefusion.target_sets import generate_targets
from teefusion.verify import repair, verify

Make = Callable[..., Settings]


class Made:
    """A finished target set and what made it."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings, self.folder, self.store = settings, folder, FolderStore(folder)
        self.prompts = Path(ingest(settings).output)
        self.manifest: Manifest = generate_targets(settings, load_prompt_set(self.prompts), self.store)

    def files(self) -> dict[str, bytes]:
        return {name: self.store.read(name) for name in self.store.sizes()}

    def repair(self) -> dict[str, str]:
        return repair(self.settings, self.prompts, self.store)


@pytest.fixture
def made(make_settings: Make, tmp_path: Path) -> Made:
    return Made(make_settings(), tmp_path / "set")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def test_every_flipped_bit_is_found(made: Made) -> None:
    """1,000 single bits, one at a time, over shards, embeddings and manifest."""
    chance = random.Random(0)
    paths = [made.folder / "manifest.json", *(made.folder / f"{r.name}.safetensors" for r in made.manifest.files)]
    sizes = [path.stat().st_size for path in paths]
    hit = set()
    for _ in range(1000):
        (path,) = chance.choices(paths, sizes)
        bit = chance.randrange(path.stat().st_size * 8)
        flip(path, bit)
        if path.name == "manifest.json":
            with pytest.raises(IntegrityError, match="manifest.json"):
                read_manifest(made.store)
        else:
            bad = verify(made.store, made.manifest)
            assert list(bad) == [path.relative_to(made.folder).as_posix().removesuffix(".safetensors")]
        flip(path, bit)
        hit.add(path)
    assert hit == set(paths)
    assert verify(made.store, read_manifest(made.store)) == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: flip(path, 8 * 700), "is corrupt: sha256"),
        (lambda path: path.write_bytes(path.read_bytes()[:-7]), "bytes, the manifest says"),
        (lambda path: path.unlink(), "is missing"),
    ],
    ids=["flipped", "truncated", "missing"],
)
@pytest.mark.parametrize("name", ["states/train-00001", "embeddings/train-00000", "embeddings/null"])
def test_a_damaged_file_is_never_read_and_is_made_anew(
    made: Made, name: str, damage: Callable[[Path], None], message: str
) -> None:
    before = made.files()
    (record,) = (record for record in made.manifest.files if record.name == name)
    damage(made.folder / f"{name}.safetensors")
    with pytest.raises(IntegrityError, match=f"{name}.safetensors.* {message}"):
        read_tensors(made.store, record)
    assert list(made.repair()) == [name]
    assert made.files() == before


@pytest.mark.parametrize("name", ["manifest.json", "states/train-00001.json"])
def test_a_damaged_manifest_or_record_is_mended(made: Made, name: str) -> None:
    before = made.files()
    text = (made.folder / name).read_text()
    at = text.index('"sha256": "') + 12
    (made.folder / name).write_text(text[:at] + ("0" if text[at] != "0" else "1") + text[at + 1 :])
    assert list(made.repair()) == (["manifest.json"] if name == "manifest.json" else [])
    assert made.files() == before


def test_settings_of_another_set_do_not_repair_this_one(made: Made, make_settings: Make) -> None:
    before = made.files()
    other = make_settings({"targets.seed": 7})
    with pytest.raises(IntegrityError, match="these settings make .* Give the settings that made it"):
        repair(other, made.prompts, made.store)
    assert made.files() == before
