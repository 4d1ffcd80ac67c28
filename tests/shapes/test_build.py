import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPModel

from teefusion.shapes import build as builder
from teefusion.shapes.folders import load_pipeline
from teefusion.shapes.plan import Plan
from teefusion.shapes.train import main

TINY = {
    "threads": 1,
    "pictures": 24,
    "steps_autoencoder": 2,
    "batch_autoencoder": 2,
    "steps_scorer": 2,
    "steps_scorer_again": 1,
    "batch_scorer": 4,
    "steps_denoiser": 2,
    "batch_denoiser": 2,
    "layers": 1,
    "width": 32,
    "measured_scenes": 2,
}


@pytest.fixture(autouse=True, scope="module")
def _same_threads_afterwards() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def options(output: Path, **changes: int) -> list[str]:
    settings = TINY | changes
    return ["--output", str(output), *(f"--{name.replace('_', '-')}={value}" for name, value in settings.items())]


def weights(output: Path) -> dict[str, str]:
    return {
        str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(output.rglob("*.safetensors"))
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shapes") / "built"
    main(options(output))
    return output


def test_a_tiny_run_writes_loadable_folders_and_its_facts(built: Path) -> None:
    teacher = load_pipeline(built / "teacher")
    assert teacher.transformer.config.num_layers == 1
    assert CLIPModel.from_pretrained(built / "scorer").config.vision_config.image_size == 64
    facts = json.loads((built / "training.json").read_text())
    assert facts["plan"]["steps_denoiser"] == 2
    assert set(facts["seconds"]) == {"autoencoder", "scorer", "teacher"}
    assert facts["guidance"]["prompts"] == 2


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(built: Path, tmp_path: Path) -> None:
    main(options(tmp_path / "again"))
    main(options(tmp_path / "other", seed=1))
    again, other, first = weights(tmp_path / "again"), weights(tmp_path / "other"), weights(built)
    assert len(first) == 11  # arbiter and the teacher's four, as parts and as published; the autoencoder as a part
    assert again == first
    assert not set(other.values()) & set(first.values())


def test_an_interrupted_run_leaves_nothing_finished_and_goes_on(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    output = tmp_path / "output"
    with monkeypatch.context() as patch:
        patch.setattr(builder, "train_denoiser", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(options(output))
    assert sorted(entry.name for entry in output.iterdir()) == ["parts", "scorer"]
    assert sorted(entry.name for entry in (output / "parts").iterdir()) == ["autoencoder", "scorer"]

    with monkeypatch.context() as patch:
        patch.setattr(builder, "train_autoencoder", interrupt)  # a finished part is not made again
        main(options(output))
    assert weights(output) == weights(built)


def test_parts_of_another_plan_are_refused(built: Path) -> None:
    with pytest.raises(SystemExit, match="made by another plan"):
        main(options(built, steps_denoiser=3))


def test_help_and_refused_options_do_not_load_torch() -> None:
    code = (
        "import sys; from teefusion.shapes.train import main\n"
        "try: main(sys.argv[1:])\nfinally: assert 'torch' not in sys.modules"
    )
    for arguments, status, said in (
        (["--help"], 0, "--steps-denoiser"),
        (["--output=x", "--layers=0"], 2, "layers is 0"),
    ):
        done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
        assert (done.returncode, said in done.stdout + done.stderr) == (status, True)


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        Plan(width=100)
