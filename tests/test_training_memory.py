"""What training takes is told before it begins, within 15 % of what is then measured."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teefusion.errors import SettingsError
from teefusion.launch import run_training
from teefusion.prompts import load_prompt_set
from teefusion.settings import Settings, load_settings, settings_from_json
from teefusion.stages.ingest import ingest
from teefusion.storage import FolderStore
from teefusion.target_sets import generate_targets
from teefusion.training_memory import estimate_memory, memory_text, trial_text

Make = Callable[..., Settings]
TOLERANCE = 0.15


def stage(settings: Settings, zero_stage: int = 0) -> dict[str, int]:
    found: dict[str, int] = estimate_memory(settings, cpu=True)["stages"][zero_stage]
    return found


def test_weights_gradients_and_optimizer_are_counted(make_settings: Make) -> None:
    settings = make_settings({"train.precision": "float32"})
    count = estimate_memory(settings)["trained_parameters"]
    plain = stage(settings)
    assert (plain["weights"], plain["gradients"]) == (4 * count, 4 * count)
    assert (plain["optimizer"], plain["average"]) == (8 * count, 4 * count)
    assert plain["peak"] >= 16 * count + plain["activations"]
    assert plain["peak"] <= 20 * count + plain["activations"]


def test_stages_share_more_and_more_out(make_settings: Make) -> None:
    settings = make_settings({"train.num_processes": 4, "train.precision": "bfloat16"})
    stages = estimate_memory(settings, cpu=True)["stages"]
    assert all(stages[0]["optimizer"] == pytest.approx(4 * stage["optimizer"], rel=1e-3) for stage in stages[1:])
    assert stages[1]["gradients"] > stages[2]["gradients"]
    assert stages[2]["weights"] > stages[3]["weights"]


def test_checkpointing_and_smaller_passes_hold_less(make_settings: Make) -> None:
    values = {"train.batch_size": 64}
    whole = stage(make_settings(values))["activations"]
    assert stage(make_settings(values | {"train.gradient_checkpointing": True}))["activations"] < 0.8 * whole
    halves = stage(make_settings(values | {"train.gradient_accumulation_steps": 2}))["activations"]
    assert halves == pytest.approx(whole / 2, rel=0.05)


def test_a_lora_has_states_of_what_it_trains_alone(make_settings: Make) -> None:
    settings = make_settings({"train.lora_rank": 2})
    estimate = estimate_memory(settings, cpu=True)
    assert estimate["trained_parameters"] < estimate["parameters"] / 5
    assert stage(settings)["optimizer"] == 8 * estimate["trained_parameters"]


@pytest.mark.slow
def test_published_teachers_are_told_without_their_weights() -> None:
    settings = load_settings(overrides={"teacher.name": "sd3-medium", "train.batch_size": 1})
    estimate = estimate_memory(settings)
    assert estimate["parameters"] == 2_028_328_000
    assert "H200" in memory_text(estimate, "H200")


def trial(settings: str, folder: str, name: str) -> None:
    """Body of a process of its own, whose memory is nobody else's."""
    from teefusion.files import write_json

    parsed = settings_from_json(settings)
    prompts = Path(ingest(parsed).output)
    targets = Path(folder) / "targets"
    generate_targets(parsed, load_prompt_set(prompts), FolderStore(targets))
    record = run_training(parsed, prompts=prompts, targets=str(targets), output=Path(folder) / name, dry_run=True)
    write_json(Path(folder) / f"{name}.json", record)


def tried(settings: Settings, folder: Path, name: str) -> dict[str, Any]:
    from teefusion.files import read_json

    process = multiprocessing.get_context("spawn").Process(target=trial, args=(settings.to_json(), str(folder), name))
    process.start()
    process.join()
    assert process.exitcode == 0
    record: dict[str, Any] = read_json(folder / f"{name}.json")
    return record


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {},
        {"train.precision": "bfloat16", "train.gradient_checkpointing": True},
        {"train.num_processes": 2, "device": "auto"},
    ],
    ids=["plain", "checkpointed", "two ranks"],
)
def test_the_estimate_is_what_a_dry_run_measures(
    make_settings: Make, tmp_path: Path, larger_teacher: Path, values: dict[str, Any]
) -> None:
    settings = make_settings(
        {"teacher.name": str(larger_teacher), "train.batch_size": 64, "targets.trajectories": 24} | values
    )
    record = tried(settings, tmp_path, "dry")
    assert record["measured_bytes"] == pytest.approx(record["estimated_bytes"], rel=TOLERANCE)
    assert record["forwards_per_second"] > 0
    assert "measured" in trial_text(record)
    assert sorted(path.name for path in (tmp_path / "dry").iterdir()) == ["dry-run.json"]
    assert not settings.workdir.joinpath("mlflow.db").exists()


def test_a_dry_run_as_a_trainjob_is_refused(make_settings: Make, tmp_path: Path) -> None:
    settings = make_settings({"cluster.nodes": 2})
    with pytest.raises(SettingsError, match="not made as a TrainJob"):
        run_training(settings, prompts=tmp_path, targets=str(tmp_path), output=tmp_path, dry_run=True)
