"""A second transformer and a LoRA beside the teacher: real files, real forwards, refused where they do not fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from teefusion.errors import TeacherError
from teefusion.settings import Settings, StrategySettings
from teefusion.sources import pin
from teefusion.strategies import TEACHER, Weights, make_strategy
from teefusion.teachers import Teacher, load_teacher
from teefusion.weights import with_weights
from tests.conftest import make_tiny_teacher

Make = Callable[..., Settings]


@pytest.fixture
def teacher(make_settings: Make) -> Teacher:
    return load_teacher(make_settings().teacher, device="cpu")


@pytest.fixture(scope="session")
def second_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("second-teacher")
    make_tiny_teacher(folder, seed=5)
    return folder


@pytest.fixture(scope="session")
def lora(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of rank 2 with random weights, as diffusers saves it."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from peft import LoraConfig, get_peft_model_state_dict

    transformer = SD3Transformer2DModel.from_pretrained(tiny_teacher, subfolder="transformer")
    transformer.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_k", "to_v"]))
    torch.manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder = tmp_path_factory.mktemp("lora")
    StableDiffusion3Pipeline.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(transformer),
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )
    return folder


def velocity(teacher: Teacher, weights: Weights) -> Tensor:
    text, null = teacher.encode(["a red star", "a box"]), teacher.encode([""])
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    return teacher.denoiser(text, null).on(weights).conditional(x, torch.tensor(500.0))


def strategy(make_settings: Make, **values: Any) -> Settings:
    return make_settings({"strategy.name": "w2sd"} | {f"strategy.{name}": value for name, value in values.items()})


def test_one_branch_is_half_of_both(teacher: Teacher) -> None:
    text, null = teacher.encode(["a red star", "a box"]), teacher.encode([""])
    x, t = torch.randn(2, *teacher.latent_shape), torch.tensor(500.0)
    denoiser = teacher.denoiser(text, null)
    conditional, unconditional = denoiser.both(x, t)
    torch.testing.assert_close(denoiser.conditional(x, t), conditional, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(denoiser.unconditional(x, t), unconditional, rtol=1e-4, atol=1e-5)


def test_a_second_transformer_takes_its_leg_and_leaves_the_teacher_alone(
    make_settings: Make, teacher: Teacher, second_teacher: Path
) -> None:
    settings = strategy(make_settings, **{"second.uri": str(second_teacher), "weak.transformer": "second"})
    both = with_weights(teacher, settings.strategy)
    other = load_teacher(
        settings.teacher.model_copy(update={"uri": str(second_teacher), "revision": None}), device="cpu"
    )
    before = velocity(teacher, TEACHER)
    # The prompts are the teacher's: only the transformer is the other's.
    seconds = velocity(both, Weights("second"))
    assert not torch.allclose(seconds, before)
    swapped = Teacher(other.pipeline, other.family, other.settings, "cpu")
    swapped.pipeline.text_encoder, swapped.pipeline.text_encoder_2 = (
        teacher.pipeline.text_encoder,
        teacher.pipeline.text_encoder_2,
    )
    torch.testing.assert_close(seconds, velocity(swapped, TEACHER))
    torch.testing.assert_close(velocity(both, TEACHER), before, rtol=0, atol=0)


def test_a_lora_acts_by_its_scale_and_is_off_at_zero(make_settings: Make, teacher: Teacher, lora: Path) -> None:
    before = velocity(teacher, TEACHER)
    settings = strategy(make_settings, **{"lora.uri": str(lora), "strong.lora_scale": 1.0})
    scaled = with_weights(teacher, settings.strategy)
    one, two, minus = (velocity(scaled, Weights(lora_scale=scale)) for scale in (1.0, 2.0, -1.5))
    assert len({round(float((value - before).norm()), 4) for value in (one, two, minus)}) == 3
    assert not torch.allclose(one, before)
    torch.testing.assert_close(velocity(scaled, TEACHER), before, rtol=0, atol=0)
    # By hand: W + scale (alpha / rank) B A.
    state = load_file(lora / "pytorch_lora_weights.safetensors")
    plain = load_teacher(settings.teacher, device="cpu")
    for name, layer in plain.pipeline.transformer.named_modules():
        if f"transformer.{name}.lora_A.weight" in state:
            down, up = (state[f"transformer.{name}.lora_{side}.weight"] for side in "AB")
            layer.weight.data += 2.0 * 3.0 * up @ down
    torch.testing.assert_close(two, velocity(plain, TEACHER), rtol=1e-4, atol=1e-5)


def test_every_strategy_runs_on_the_teacher_at_its_price(
    make_settings: Make, teacher: Teacher, second_teacher: Path, lora: Path
) -> None:
    counted: list[int] = []

    def count(module: Any, arguments: Any, output: tuple[Tensor]) -> None:
        counted.append(output[0].shape[0])

    weights = {"second.uri": str(second_teacher), "lora.uri": str(lora)}
    legs = {"strong.lora_scale": 1.0, "weak.transformer": "second", "normal.guidance": 3.0}
    cases = [{"name": "euler_cfg"}, {"name": "z_sampling"}, {"name": "w2sd", **weights, **legs}]
    for values in cases:
        settings = strategy(make_settings, **values)
        chosen, able = make_strategy(settings.strategy), with_weights(teacher, settings.strategy)
        hooks = [
            model.register_forward_hook(count)
            for model in (able.pipeline.transformer, able.second)
            if model is not None
        ]
        grid = able.grid(settings.strategy.num_steps)
        denoiser = able.denoiser(able.encode(["a red star", "a box"]), able.encode([""]))
        x = torch.randn(2, *able.latent_shape)
        counted.clear()
        for i in range(len(grid)):
            x = chosen.step(denoiser, grid, x, i, torch.tensor([2.0, 5.0])).x_next_BCHW
        for hook in hooks:
            hook.remove()
        assert bool(torch.isfinite(x).all())
        assert sum(counted) == 2 * chosen.forwards(len(grid))


def test_revisions_are_pinned_and_a_change_is_noticed(
    make_settings: Make, teacher: Teacher, lora: Path, tmp_path: Path
) -> None:
    file = tmp_path / "mine.safetensors"
    save_file(load_file(lora / "pytorch_lora_weights.safetensors"), file)
    settings = pin(strategy(make_settings, **{"lora.uri": str(file), "strong.lora_scale": 1.0}))
    assert settings.strategy.lora is not None
    assert str(settings.strategy.lora.revision).startswith("sha256:")
    save_file({name: value + 1 for name, value in load_file(file).items()}, file)
    with pytest.raises(TeacherError, match=r"has changed: this run was made for revision"):
        with_weights(teacher, settings.strategy)


def test_a_second_transformer_of_another_shape_is_refused(
    make_settings: Make, teacher: Teacher, tmp_path: Path
) -> None:
    from diffusers import SD3Transformer2DModel

    make_tiny_teacher(tmp_path)
    config = dict(teacher.pipeline.transformer.config) | {"num_layers": 1}
    SD3Transformer2DModel.from_config(config).save_pretrained(tmp_path / "transformer")
    settings = strategy(make_settings, **{"second.uri": str(tmp_path), "weak.transformer": "second"})
    with pytest.raises(TeacherError, match=r"another network than the teacher's: transformer_blocks.*missing there"):
        with_weights(teacher, settings.strategy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: {name.replace("blocks.1", "blocks.9"): v for name, v in state.items()}, r"no layer .*blocks.9"),
        (lambda state: {name: torch.cat([v, v], dim=1) for name, v in state.items()}, r"has width 32, the teacher's"),
        (lambda state: {"unet." + name: v for name, v in state.items()}, r"is no LoRA weight of a transformer"),
    ],
)
def test_a_lora_of_another_base_is_refused(
    make_settings: Make,
    teacher: Teacher,
    lora: Path,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    file = tmp_path / "other.safetensors"
    save_file(change(load_file(lora / "pytorch_lora_weights.safetensors")), file)
    settings = strategy(make_settings, **{"lora.uri": str(file), "strong.lora_scale": 1.0})
    with pytest.raises(TeacherError, match=message):
        with_weights(teacher, settings.strategy)


def test_a_lora_that_is_none_is_refused(make_settings: Make, teacher: Teacher, tmp_path: Path) -> None:
    file = tmp_path / "rubbish.safetensors"
    file.write_bytes(b"rubbish" * 10)
    for uri, message in ((file, "cannot be read"), (tmp_path / "missing", "is not on this machine")):
        values = StrategySettings(name="w2sd", lora={"uri": str(uri)}, strong={"lora_scale": 1.0})
        with pytest.raises(TeacherError, match=message):
            with_weights(teacher, values)
