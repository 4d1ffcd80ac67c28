"""Sampling by a strategy against the stock pipeline, and a reflective teacher through the whole pipeline's stages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from teefusion.sampling import sample
from teefusion.settings import Settings
from teefusion.stages.evaluate import evaluate
from teefusion.stages.ingest import ingest
from teefusion.stages.targets import targets
from teefusion.stages.train import train
from teefusion.strategies import make_strategy
from teefusion.teachers import load_teacher

Make = Callable[..., Settings]


def seeded() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (3, 4)]


def test_plain_guidance_gives_the_stock_pipelines_pictures(make_settings: Make) -> None:
    settings = make_settings()
    teacher, prompts = load_teacher(settings.teacher, device="cpu"), ["a red star", "a box"]
    options: dict[str, Any] = {"guidance_scale": 4.0}
    ours = sample(
        teacher,
        make_strategy(settings.strategy),
        prompts,
        num_steps=4,
        generators=seeded(),
        output_type="np",
        **options,
    )
    stock = teacher.pipeline(
        prompts, num_inference_steps=4, generator=seeded(), max_sequence_length=0, output_type="np", **options
    ).images
    assert ours.shape == stock.shape == (2, 16, 16, 3)
    torch.testing.assert_close(torch.from_numpy(ours), torch.from_numpy(stock), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["z_sampling", "w2sd"])
def test_a_reflective_teacher_is_evaluated_as_it_taught(make_settings: Make, name: str) -> None:
    settings = make_settings({"strategy.name": name, "train.steps": 2})
    prompts = Path(ingest(settings).output)
    made = targets(settings, prompts).output
    student = Path(train(settings, prompts, made).details["student"])
    nfe = evaluate(settings, prompts, student).details["nfe"]
    assert nfe == {"unguided": 4, "cfg": 2 * 4, "cfg_matched": 2 * 4, "teacher": 5 * 4 - 3, "student": 4}
