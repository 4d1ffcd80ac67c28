"""A small training on real targets, what it leaves, and what MLflow has of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

from teefusion.launch import run_training
from teefusion.manifests import Manifest
from teefusion.pictures import contact_sheet
from teefusion.prompts import load_prompt_set
from teefusion.settings import Settings
from teefusion.stages.ingest import ingest
from teefusion.storage import FolderStore
from teefusion.target_sets import generate_targets
from teefusion.training_run import Run

Make = Callable[..., Settings]


class Job:
    """A prompt set and a target set, and training on them."""

    def __init__(self, make_settings: Make, folder: Path) -> None:
        self.make, self.folder = make_settings, folder
        self.prompts = Path(ingest(make_settings()).output)
        self.targets = folder / "targets"
        self.manifest: Manifest = generate_targets(
            make_settings(), load_prompt_set(self.prompts), FolderStore(self.targets)
        )

    def train(self, name: str, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
        return run_training(
            self.make(overrides), prompts=self.prompts, targets=str(self.targets), output=self.folder / name
        )

    def break_off(self, name: str, overrides: dict[str, Any] | None = None, *, after: int) -> None:
        """Train until ``after`` steps, and then as if somebody pressed Ctrl-C."""
        after_step = Run._after_step

        def stop(run: Any, *arguments: Any) -> None:
            after_step(run, *arguments)
            if run.position.step == after:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Run, "_after_step", stop)
            with pytest.raises(KeyboardInterrupt):
                self.train(name, overrides)

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder / name / "student" / "transformer" / "diffusion_pytorch_model.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float) -> None:
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], atol=atol, rtol=0)


def tracked_run(settings: Settings) -> tuple[Any, Any]:
    """MLflow's client, and the run of these settings."""
    from teefusion.tracking import RUN_KEY_TAG, connect

    client = connect(settings)
    experiment = client.get_experiment_by_name("teefusion")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{RUN_KEY_TAG}` = '{settings.run_key}'")
    return client, run


def logged_pictures(settings: Settings) -> dict[str, Image.Image]:
    """The pictures of the run's artifacts, by path."""
    client, run = tracked_run(settings)
    paths = [item.path for folder in ("", "samples") for item in client.list_artifacts(run.info.run_id, folder)]
    return {p: Image.open(client.download_artifacts(run.info.run_id, p)) for p in paths if p.endswith(".png")}


def assert_shown(sheet: Image.Image, student: Any, job: Job, *, steps: int = 4) -> None:
    """The sheet is what the exported student makes, but for rounding: four held-out prompts, s from 1 to 7."""
    settings, prompts = job.make().strategy, load_prompt_set(job.prompts).heldout[:4]
    scales = torch.linspace(settings.guidance_min, settings.guidance_max, 4).tolist()

    def picture(prompt: str, s: float) -> Image.Image:
        noise = torch.Generator().manual_seed(0)
        return student(prompt, guidance_scale=s, num_inference_steps=steps, generator=noise).images[0]

    rows = [[picture(prompt.text, s) for s in scales] for prompt in prompts]
    difference = ImageChops.difference(sheet, contact_sheet(rows))
    assert max(high for _, high in difference.getextrema()) <= 2
