"""Targets on a user's own pictures: noised latents with the teacher's velocity there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from teefusion.errors import PromptError
from teefusion.images import CaptionedPictures
from teefusion.prompts import Prompt, load_prompt_set
from teefusion.settings import Settings
from teefusion.shards import read_tensors
from teefusion.stages.ingest import ingest
from teefusion.storage import FolderStore
from teefusion.strategies import guide
from teefusion.target_sets import generate_targets
from teefusion.teachers import load_teacher

Make = Callable[..., Settings]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Thirty pictures of one colour each, some of another shape, with captions."""
    path = tmp_path / "pictures"
    path.mkdir()
    lines = []
    for k in range(30):
        size = (16, 16) if k % 3 else (40, 20)
        Image.new("RGB", size, (8 * k, 255 - 8 * k, 100)).save(path / f"{k}.png")
        lines.append(json.dumps({"file_name": f"{k}.png", "prompt": f"colour {k}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return path


def settings_of(make_settings: Make, folder: Path) -> Settings:
    return make_settings({"targets.images": str(folder), "prompts.source": str(folder / "metadata.jsonl")})


def test_states_are_noised_latents_with_the_teachers_velocity(
    make_settings: Make, folder: Path, tmp_path: Path
) -> None:
    settings = settings_of(make_settings, folder)
    prompts = load_prompt_set(Path(ingest(settings).output))
    manifest = generate_targets(settings, prompts, FolderStore(tmp_path / "set"))
    teacher = load_teacher(settings.teacher, device="cpu")
    grid, null = teacher.grid(4), teacher.encode([""])
    stored = read_tensors(FolderStore(tmp_path / "set"), manifest.train.states[0])
    rows = {name: value[:12] for name, value in stored.items()}
    used = [prompts.train[p] for p in rows["prompt"].tolist()]
    x0 = CaptionedPictures(folder).latents(teacher.pipeline, used, height=16, width=16)
    sigma = rows["sigma"].view(-1, 1, 1, 1)
    noise = (rows["x"] - (1 - sigma) * x0) / sigma
    assert 0.8 < float(noise.std()) < 1.2
    flat = noise.flatten(1)
    assert float(torch.corrcoef(flat).fill_diagonal_(0).abs().max()) < 0.4  # each state has noise of its own
    for k, prompt in enumerate(used):
        denoiser = teacher.denoiser(teacher.encode([prompt.text]), null)
        conditional, unconditional = denoiser.both(rows["x"][k : k + 1], grid.timesteps[int(rows["step"][k])])
        expected = guide(conditional, unconditional, rows["guidance"][k : k + 1])
        torch.testing.assert_close(rows["velocity"][k : k + 1], expected, rtol=1e-3, atol=1e-3)
    assert manifest.forwards == 2 * 3 * 16  # two branches at three kept steps
    again = generate_targets(settings, prompts, FolderStore(tmp_path / "again"))
    assert [record.sha256 for record in again.train.states] == [record.sha256 for record in manifest.train.states]


def test_other_pictures_make_another_set(make_settings: Make, folder: Path) -> None:
    before = settings_of(make_settings, folder).targets.images_sha256
    Image.new("RGB", (16, 16), (1, 2, 3)).save(folder / "0.png")
    assert settings_of(make_settings, folder).targets.images_sha256 != before


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "metadata.jsonl").unlink(), "metadata.jsonl cannot be read"),
        (lambda f: (f / "metadata.jsonl").write_text('{"file_name": 3}\n'), r"line 1: needs .*prompt"),
        (lambda f: (f / "metadata.jsonl").write_bytes(b"\xff\xfe\x00"), "metadata.jsonl cannot be read"),
    ],
)
def test_a_folder_that_cannot_be_read_is_refused(folder: Path, damage: Any, message: str) -> None:
    damage(folder)
    with pytest.raises(PromptError, match=message):
        CaptionedPictures(folder)


def test_a_prompt_without_picture_and_a_picture_that_is_none_are_refused(make_settings: Make, folder: Path) -> None:
    pictures = CaptionedPictures(folder)
    with pytest.raises(PromptError, match="1 of 2 prompts have no picture .*'colour 99'"):
        pictures.require([Prompt("colour 1"), Prompt("colour 99")])
    (folder / "1.png").write_bytes(b"no picture")
    teacher = load_teacher(make_settings().teacher, device="cpu")
    with pytest.raises(PromptError, match=r"1\.png cannot be read as a picture"):
        pictures.latents(teacher.pipeline, [Prompt("colour 1")], height=16, width=16)
