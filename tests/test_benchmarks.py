"""The benchmarks measure what they say: both sides of a comparison do the same work."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from teefusion.gate import Evidence, decide
from teefusion.settings import GateSettings

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.append(str(FOLDER))  # as Python does for a program that it runs; the programs share modules


def load(name: str) -> ModuleType:
    """A program of the folder, as a module; it is no package."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def program() -> ModuleType:
    return load("targets")


@pytest.mark.parametrize("strategy", ["euler_cfg", "z_sampling", "w2sd"])
def test_the_plain_loop_makes_the_states_and_forwards_of_the_walk(
    program: ModuleType, tiny_teacher: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    monkeypatch.setenv("TEEFUSION_TEACHER__DTYPE", "float32")
    bench = program.RealTeacher(argparse.Namespace(teacher=str(tiny_teacher), strategy=strategy, steps=4, device="cpu"))
    called: list[int] = []
    bench.teacher.pipeline.transformer.register_forward_hook(
        lambda _module, _arguments, output: called.append(len(output[0]))
    )
    (ours,) = bench.ours(3, 3)
    assert sum(called) == 3 * bench.strategy.forwards(4)
    plain = bench.plain(3)
    assert sum(called) == 2 * 3 * bench.strategy.forwards(4)
    for name in ("x", "velocity"):
        torch.testing.assert_close(torch.cat([rows[name] for rows in plain]), ours[name], atol=1e-3, rtol=1e-3)


def run(program: ModuleType, capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["targets.py", *arguments, "--device", "cpu", "--rounds", "1", "--json"])
        program.main()
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_comparison_names_the_best_batch(
    program: ModuleType, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--teacher", str(tiny_teacher), "--steps", "2", "--batches", "1,4", "--trajectories", "4")
    result = run(program, capsys, *options)
    rates = {int(batch): values["trajectories_a_second"]["median"] for batch, values in result["batches"].items()}
    assert result["best_batch"] == max(rates, key=lambda batch: rates[batch])
    assert 0 < result["transformer_share"] < 1
    ratio = rates[result["best_batch"]] / result["plain_trajectories_a_second"]["median"]
    assert result["speedup_vs_naive"] == pytest.approx(ratio)
    assert program.compare_text(result).count("trajectories/s") == 3


def test_a_shape_with_random_weights_is_measured(
    program: ModuleType, tiny_teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--architecture", str(tiny_teacher), "--batches", "2", "--steps", "2", "--peak", "mine:0.001")
    result = run(program, capsys, *options)
    (values,) = result["modes"]["plain"].values()
    rate = values["forwards_a_second"]["median"]
    assert values["utilisation"] == pytest.approx(rate * result["forward_flops"] / 1e9)
    assert "% of the peak" in program.shape_text(result)


def test_the_tables_of_the_scale_page_are_what_their_program_prints() -> None:
    scale = load("scale")
    page = (FOLDER.parent / "docs" / "scale.md").read_text()
    missing = [name for name, table in scale.tables("H200", None).items() if table not in page]
    assert missing == [], "make docs/scale.md's tables anew with benchmarks/scale.py, and read its text again"


def test_the_gates_simulation_decides_as_the_gate_does() -> None:
    gate = load("gate")
    rules = GateSettings(resamples=1000, min_prompts=2)
    rng = np.random.default_rng(3)
    differences = [0.03 * rng.standard_normal((12, 40)) for _ in range(gate.STYLES)]
    simulated = gate.passes(differences, rules)
    decided = [
        decide(
            Evidence(
                styles=[f"style {k}" for k in range(gate.STYLES) for _ in range(12)],
                teacher_prompts=(prompts := [f"{k}/{n:02d}" for k in range(gate.STYLES) for n in range(12)]),
                student_prompts=prompts,
                teacher_scores=[1.0] * 48,
                student_scores=[1.0 + value for style_NT in differences for value in style_NT[:, trial]],
                nfe_teacher=2.0,
                nfe_student=1.0,
                seconds_teacher=2.0,
                seconds_student=1.0,
                diversity_teacher=1.0,
                diversity_student=1.0,
                guidance_residual=0.1,
            ),
            rules,
        ).passed
        for trial in range(40)
    ]
    assert 0 < sum(decided) < 40
    assert simulated.tolist() == decided


def test_the_recorded_simulation_keeps_what_the_gate_promises() -> None:
    page = (FOLDER.parent / "docs" / "results" / "gate.md").read_text()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ") and " % | " in line]
    of_80_and_more = [row for row in rows if row[1] in ("80", "800")]
    assert len(of_80_and_more) == 12
    assert all(float(cell.split()[0]) <= 5 for row in of_80_and_more for cell in row[2:4])


def test_the_bare_loop_scores_as_the_scorer_does(tiny_scorer: Path) -> None:
    scoring = load("scoring")
    options = {"scorer": str(tiny_scorer), "device": "cpu", "pictures": 6, "side": 24, "batch": 4, "rounds": 1}
    result = scoring.measure(argparse.Namespace(**options))
    assert result["largest_difference"] < 1e-3
    assert result["ratio_to_bare_loop"] > 0


# --- training ---------------------------------------------------------------------------------------------------------

SMALL = ("prompts.heldout_fraction=0.4", "teacher.max_sequence_length=0", "strategy.num_steps=4")
SMALL += ("targets.states_per_trajectory=3", "targets.shard_trajectories=4", "targets.batch_size=4")


def run_training(program: str, capsys: pytest.CaptureFixture[str], *arguments: str, settings: tuple[str, ...]) -> Any:
    sets = [part for setting in settings for part in ("--set", setting)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments, *sets, "--rounds", "1", "--json"])
        load(program).main()
    AcceleratorState._reset_state(reset_partial_state=True)  # which Accelerate keeps for the process
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_the_plain_training_loop_has_the_losses_of_ours(
    tiny_teacher: Path, prompt_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = (*SMALL, f"prompts.source={prompt_file}", "train.batch_size=4", "train.precision=float32")
    options = ("--teacher", str(tiny_teacher), "--steps", "3", "--trajectories", "8")
    result = run_training("training", capsys, *options, settings=settings)
    assert result["loss_gap"]["greatest"] < 0.01  # targets are stored in float16
    assert result["last_losses"]["same_step"] == pytest.approx(result["last_losses"]["ours"], rel=0.01)
    assert result["speedup_vs_plain"] > 0
    assert 0 <= result["data_wait_share"] < 1
    assert 0 <= result["data_wait_share_s3"] < 1


def test_the_parts_of_a_training_step_make_the_whole(tiny_teacher: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--architecture", str(tiny_teacher), "--device", "cpu", "--batch-size", "2", "--peak", "mine:1")
    result = run_training("training_shape", capsys, *options, settings=("teacher.max_sequence_length=0",))
    assert set(result["parts_seconds"]) == {"data", "forward", "backward", "optimizer", "other"}
    assert all(seconds > 0 for seconds in result["parts_seconds"].values())
    assert result["mfu"] == pytest.approx(result["step_flops"] / result["step_seconds"]["median"] / 1e12)


def test_one_law_is_fitted_to_the_steps_of_all_sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = load("training_scaling")
    monkeypatch.setattr(scaling, "SWEEPS", {"pixels": [32], "batch": [1, 2], "layers": [1]})
    result = scaling.measure(argparse.Namespace(device="cpu", rounds=1))
    law = result["law"]
    for point in result["points"]:
        expected = law["overhead_seconds"] + law["seconds_per_flop"] * point["flops"]
        assert point["law_seconds"] == pytest.approx(expected)
    one, two = (point["flops"] for point in result["points"] if point["sweep"] == "batch")
    assert two == 2 * one
    scaling.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert scaling.text(result).count("| batch |") == 2
