"""On-policy states against a walk by hand, with a student that is a formula and a real teacher."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import Tensor

from teefusion.families import TextEmbeddings
from teefusion.onpolicy import OnPolicyStream
from teefusion.prompts import load_prompt_set
from teefusion.settings import Settings
from teefusion.stages.ingest import ingest
from teefusion.storage import FolderStore
from teefusion.strategies import guide, make_strategy
from teefusion.stream import StateStream, read_null
from teefusion.target_sets import generate_targets
from teefusion.teachers import Teacher, load_teacher

Make = Callable[..., Settings]


def student(x: Tensor, sigma: Tensor, s: Tensor, text: TextEmbeddings) -> Tensor:
    return 0.1 * s.view(-1, 1, 1, 1) * x + sigma.view(-1, 1, 1, 1)


@pytest.fixture
def made(make_settings: Make, tmp_path: Path) -> tuple[OnPolicyStream, Teacher, TextEmbeddings]:
    settings = make_settings()
    prompts = load_prompt_set(Path(ingest(settings).output))
    manifest = generate_targets(settings, prompts, FolderStore(tmp_path / "set"))
    teacher = load_teacher(settings.teacher, device="cpu")
    null = read_null(FolderStore(tmp_path / "set"), manifest)
    stored = StateStream(FolderStore(tmp_path / "set"), manifest, "train")
    return OnPolicyStream(stored, teacher, make_strategy(settings.strategy), 4, null, student), teacher, null


def test_a_state_is_where_the_student_walked_and_its_velocity_the_teachers(
    made: tuple[OnPolicyStream, Teacher, TextEmbeddings],
) -> None:
    stream, teacher, null = made
    grid, seen = teacher.grid(4), set()
    for position, states in enumerate(islice(stream.batches(batch_size=4, seed=7), 12)):
        i = grid.sigmas.tolist().index(float(states.sigma_B[0]))
        seen.add(i)
        x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed((7 * 1_000_003 + position) * 2 + 1))
        for k in range(i):
            x = x + (grid.sigmas[k + 1] - grid.sigmas[k]) * student(
                x, grid.sigmas[k].expand(4), states.guidance_B, states.text
            )
        torch.testing.assert_close(states.x_BCHW, x)
        conditional, unconditional = teacher.denoiser(states.text, null).both(x, grid.timesteps[i])
        expected = guide(conditional, unconditional, states.guidance_B)
        torch.testing.assert_close(states.velocity_BCHW, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            states.gap_B, (expected - conditional).square().mean(dim=(1, 2, 3)), rtol=1e-2, atol=1e-4
        )
    assert seen == {0, 1, 2, 3}


def test_it_continues_anywhere_and_ranks_share_a_batch(made: tuple[OnPolicyStream, Teacher, TextEmbeddings]) -> None:
    stream = made[0]

    def xs(count: int, **options: int) -> list[Tensor]:
        return [states.x_BCHW for states in islice(stream.batches(batch_size=4, seed=1, **options), count)]

    whole = xs(6)
    assert all(torch.equal(a, b) for a, b in zip(xs(2, start=4), whole[4:], strict=True))
    halves = [xs(3, rank=rank, ranks=2) for rank in (0, 1)]
    for k in range(3):
        both = torch.stack([halves[0][k], halves[1][k]], dim=1).flatten(0, 1)
        torch.testing.assert_close(both, whole[k])
