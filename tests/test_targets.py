"""Target sets: reproducible, resumable, refused when they are not what their manifest says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teefusion import target_sets
from teefusion.errors import IntegrityError, TeacherError, TrainingError
from teefusion.families import TextEmbeddings
from teefusion.manifests import FileRecord, Manifest, read_manifest
from teefusion.prompts import PromptSet, load_prompt_set
from teefusion.settings import Settings
from teefusion.shards import all_finished, finished, read_tensors, write_tensors
from teefusion.stages.ingest import ingest
from teefusion.storage import FolderStore
from teefusion.strategies import make_strategy
from teefusion.target_sets import generate_targets
from teefusion.targets import draw, walk
from teefusion.teachers import load_teacher
from tests.conftest import make_tiny_teacher

Make = Callable[..., Settings]


@pytest.fixture
def prompts(make_settings: Make) -> PromptSet:
    return load_prompt_set(Path(ingest(make_settings()).output))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def made(make_settings: Make, prompts: PromptSet, tmp_path: Path) -> tuple[Path, Manifest]:
    return tmp_path / "set", generate_targets(make_settings(), prompts, FolderStore(tmp_path / "set"))


def test_a_set_holds_what_was_asked_for(made: tuple[Path, Manifest]) -> None:
    folder, manifest = made
    assert manifest.train.rows == 12 * 3
    assert manifest.heldout.rows == 4 * 3
    assert [record.rows for record in manifest.train.states] == [12, 12, 12]
    assert manifest.forwards == 16 * 2 * 4
    rows = read_tensors(FolderStore(folder), manifest.train.states[0])
    assert rows["x"].shape == rows["velocity"].shape == (12, 4, 8, 8)
    assert rows["x"].dtype == torch.float32
    assert bool(((rows["guidance"] >= 1) & (rows["guidance"] <= 7)).all())
    assert len(set(rows["guidance"].tolist())) == 4  # one draw a trajectory
    for name, value in zip(rows["step"].tolist(), rows["sigma"].tolist(), strict=True):
        assert value == pytest.approx(manifest.sigmas[name])


def test_stored_states_are_one_trajectory_of_the_teacher(
    make_settings: Make, prompts: PromptSet, made: tuple[Path, Manifest]
) -> None:
    """Walk trajectory 5 again by hand: guided Euler steps from its own noise meet every stored state."""
    settings, (folder, manifest) = make_settings(), made
    teacher = load_teacher(settings.teacher, device="cpu")
    plan = draw(settings, "train", 5, prompts.train[5], teacher.latent_shape)
    text, null = teacher.encode([prompts.train[5].text]), teacher.encode([""])
    rows = read_tensors(FolderStore(folder), manifest.train.states[1])
    mine = rows["trajectory"] == 5
    grid, x = teacher.grid(4), plan.noise_CHW[None]
    stored = dict(
        zip(rows["step"][mine].tolist(), zip(rows["x"][mine], rows["velocity"][mine], strict=True), strict=True)
    )
    assert tuple(stored) == plan.steps_K
    for i in range(4):
        t = grid.timesteps[i].expand(1)
        with torch.no_grad():
            v_c, v_u = (
                teacher.pipeline.transformer(x, part.tokens_BTE, part.pooled_BP, t, return_dict=False)[0]
                for part in (text, null)
            )
        velocity = v_u + plan.guidance * (v_c - v_u)
        if i in stored:
            torch.testing.assert_close(stored[i][0], x[0], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(stored[i][1], velocity[0], atol=1e-3, rtol=1e-3)
        x = x + (grid.sigmas[i + 1] - grid.sigmas[i]) * velocity


def test_the_same_settings_give_the_same_bytes(
    make_settings: Make, prompts: PromptSet, made: tuple[Path, Manifest], tmp_path: Path
) -> None:
    generate_targets(make_settings(), prompts, FolderStore(tmp_path / "again"))
    assert files(tmp_path / "again") == files(made[0])


def test_killed_half_way_it_makes_only_what_is_missing_and_ends_byte_identical(
    make_settings: Make,
    prompts: PromptSet,
    made: tuple[Path, Manifest],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    walked: list[int] = []

    def killed_at(limit: int) -> None:
        def counting(*arguments: object) -> dict[str, Tensor]:
            if len(walked) == limit:
                raise KeyboardInterrupt
            walked.append(1)
            return walk(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(target_sets, "walk", counting)

    folder = tmp_path / "killed"
    killed_at(2)
    with pytest.raises(KeyboardInterrupt):
        generate_targets(make_settings(), prompts, FolderStore(folder))
    with pytest.raises(IntegrityError, match="no finished target set"):
        read_manifest(FolderStore(folder))
    walked.clear()
    killed_at(99)
    generate_targets(make_settings(), prompts, FolderStore(folder))
    assert len(walked) == 2  # 3 train shards + 1 held out, 2 of them done before
    assert files(folder) == files(made[0])


def test_a_file_without_its_record_is_not_trusted(tmp_path: Path) -> None:
    record = write_tensors(FolderStore(tmp_path), "a/b", {"x": torch.arange(3)})
    assert (
        finished(FolderStore(tmp_path), "a/b")
        == record
        == FileRecord(name="a/b", rows=3, bytes=record.bytes, sha256=record.sha256)
    )
    (tmp_path / "a" / "b.json").unlink()
    assert finished(FolderStore(tmp_path), "a/b") is None


def test_a_listing_finds_what_looking_up_each_file_finds(tmp_path: Path) -> None:
    store = FolderStore(tmp_path)
    names = [f"states/train-{k:05d}" for k in range(5)]
    for name in names[:4]:
        write_tensors(store, name, {"x": torch.arange(3)})
    (tmp_path / f"{names[1]}.json").unlink()
    (tmp_path / f"{names[2]}.safetensors").write_bytes(b"cut")
    (tmp_path / f"{names[3]}.json").write_text("{")
    each = {name: record for name in names if (record := finished(store, name))}
    assert all_finished(store, names) == each
    assert list(each) == names[:1]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_teacher_gives_the_same_targets(make_settings: Make, prompts: PromptSet, tmp_path: Path) -> None:
    """In float32; compiled kernels round otherwise."""
    sets = []
    for compiled in (False, True):
        store = FolderStore(tmp_path / str(compiled))
        settings = make_settings({"targets.compile": compiled})
        record = generate_targets(settings, prompts, store).train.states[0]
        sets.append(read_tensors(store, record))
    for name, value in sets[0].items():
        torch.testing.assert_close(sets[1][name], value, rtol=1e-3, atol=1e-4)


def test_a_manifest_of_another_schema_version_is_refused(made: tuple[Path, Manifest]) -> None:
    path = made[0] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(IntegrityError, match="schema version 99, this program reads 1"):
        read_manifest(FolderStore(made[0]))


def test_a_manifest_of_another_teacher_is_refused(made: tuple[Path, Manifest]) -> None:
    with pytest.raises(IntegrityError, match="this run distils revision sha256:other"):
        read_manifest(FolderStore(made[0]), teacher_revision="sha256:other")


def test_a_manifest_with_a_field_missing_is_refused(made: tuple[Path, Manifest]) -> None:
    path = made[0] / "manifest.json"
    values = json.loads(path.read_text())
    del values["train"]
    path.write_text(json.dumps(values))
    with pytest.raises(IntegrityError, match="train: Field required"):
        read_manifest(FolderStore(made[0]))


def test_a_draw_depends_on_its_own_identity_alone(make_settings: Make, prompts: PromptSet) -> None:
    settings, prompt = make_settings(), prompts.train[0]
    first = draw(settings, "train", 7, prompt, (4, 8, 8))
    torch.manual_seed(99)
    again = draw(settings, "train", 7, prompt, (4, 8, 8))
    assert torch.equal(first.noise_CHW, again.noise_CHW)
    assert (first.guidance, first.steps_K) == (again.guidance, again.steps_K)
    for other in (draw(settings, "heldout", 7, prompt, (4, 8, 8)), draw(settings, "train", 8, prompt, (4, 8, 8))):
        assert not torch.equal(first.noise_CHW, other.noise_CHW)


def test_non_finite_velocities_stop_the_run_and_are_not_stored(make_settings: Make, prompts: PromptSet) -> None:
    settings = make_settings()
    teacher = load_teacher(settings.teacher, device="cpu")
    next(teacher.pipeline.transformer.parameters()).data.fill_(float("nan"))
    text, null = teacher.encode(["a", "b"]), teacher.encode([""])
    draws = [draw(settings, "train", k, prompts.train[k], teacher.latent_shape) for k in range(2)]
    named = f"non-finite velocity at step 0, prompt '{draws[0].prompt}', seed {draws[0].seed}, guidance"
    with pytest.raises(TrainingError, match=named):
        walk(teacher, make_strategy(settings.strategy), teacher.grid(4), text, TextEmbeddings(*null), draws)


@pytest.mark.parametrize("name", ["z_sampling", "w2sd"])
def test_a_reflective_set_is_as_any_other(make_settings: Make, prompts: PromptSet, tmp_path: Path, name: str) -> None:
    settings = make_settings({"strategy.name": name})
    manifest = generate_targets(settings, prompts, FolderStore(tmp_path / "set"))
    assert manifest.forwards == 16 * (5 * 4 - 3)
    assert manifest.strategy["name"] == name
    reflected, plain = (
        generate_targets(make_settings(values), prompts, FolderStore(tmp_path / folder)).train.states[0].sha256
        for values, folder in (({"strategy.name": name}, "again"), ({}, "plain"))
    )
    assert reflected == manifest.train.states[0].sha256 != plain


def test_a_teacher_that_lacks_a_weight_is_refused(make_settings: Make, tmp_path: Path) -> None:
    make_tiny_teacher(tmp_path / "teacher")
    file = tmp_path / "teacher" / "text_encoder" / "model.safetensors"
    state = load_file(file)
    lost = sorted(state)[3]
    save_file({key: value for key, value in state.items() if key != lost}, file, metadata={"format": "pt"})
    settings = make_settings({"teacher.name": str(tmp_path / "teacher")})
    with pytest.raises(TeacherError, match=f"text_encoder lacks 1 of its weights, {lost}"):
        load_teacher(settings.teacher, device="cpu")


def test_stored_states_take_the_type_the_settings_say(make_settings: Make, prompts: PromptSet, tmp_path: Path) -> None:
    manifest = generate_targets(make_settings({"targets.dtype": "float16"}), prompts, FolderStore(tmp_path / "half"))
    rows = read_tensors(FolderStore(tmp_path / "half"), manifest.train.states[0])
    assert rows["x"].dtype == rows["velocity"].dtype == torch.float16
    assert rows["sigma"].dtype == rows["guidance"].dtype == torch.float32
