"""Every family on tiny random models with the config keys of the published ones, from forward to folder and back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from teefusion import StudentPipeline
from teefusion.errors import TeacherError
from teefusion.families import family_of
from teefusion.fusion import FusedConditioning, fuse, make_fusion, measure_sizes, pack
from teefusion.serving.batches import Picture
from teefusion.serving.student import load_served
from teefusion.settings import StrategySettings, TeacherSettings, load_settings
from teefusion.strategies import make_strategy
from teefusion.students import load_student, make_student, save_student
from teefusion.teachers import Teacher, load_teacher
from tests.by_hand import mlps, psi
from tests.conftest import letter_tokenizer, tiny_autoencoder, tiny_clip

# The keys of the published configs, with small numbers; dev and schnell differ in guidance_embeds alone.
SD35 = {
    "attention_head_dim": 8,
    "caption_projection_dim": 16,
    "dual_attention_layers": [0],
    "in_channels": 4,
    "joint_attention_dim": 40,
    "num_attention_heads": 2,
    "num_layers": 2,
    "out_channels": 4,
    "patch_size": 2,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
    "qk_norm": "rms_norm",
    "sample_size": 8,
}
FLUX = {
    "attention_head_dim": 12,
    "axes_dims_rope": [4, 4, 4],
    "guidance_embeds": False,
    "in_channels": 16,
    "joint_attention_dim": 16,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 1,
    "patch_size": 1,
    "pooled_projection_dim": 16,
}


def t5(width: int) -> Any:
    return T5EncoderModel(T5Config(vocab_size=64, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2))


def word_tokenizer() -> Any:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "red": 4, "star": 5, "box": 6}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )


def make_sd35() -> Any:
    return StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel(**SD35),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_autoencoder(),
        text_encoder=tiny_clip(),
        tokenizer=letter_tokenizer(),
        text_encoder_2=tiny_clip(),
        tokenizer_2=letter_tokenizer(),
        text_encoder_3=t5(40),
        tokenizer_3=word_tokenizer(),
    )


def make_flux(*, dev: bool) -> Any:
    return FluxPipeline(
        transformer=FluxTransformer2DModel(**(FLUX | {"guidance_embeds": dev})),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=tiny_autoencoder(),
        text_encoder=tiny_clip(projected=False),
        tokenizer=letter_tokenizer(),
        text_encoder_2=t5(16),
        tokenizer_2=word_tokenizer(),
    )


MAKERS: dict[str, Callable[[], Any]] = {
    "sd3.5": make_sd35,
    "flux-schnell": lambda: make_flux(dev=False),
    "flux-dev": lambda: make_flux(dev=True),
}


@pytest.fixture(scope="module", params=list(MAKERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param]().save_pretrained(path)
    return path


@pytest.fixture
def teacher(folder: Path) -> Teacher:
    settings = TeacherSettings(
        name=str(folder), uri=str(folder), height=16, width=16, max_sequence_length=12, embedded_guidance=3.5
    )
    return load_teacher(settings, device="cpu")


def by_hand(module: Any, t: float, c: Tensor, null: Tensor, s: float, embedded: float | None) -> Tensor:
    """The paper's formula in float64, from the weights alone."""
    mlp = mlps(module.state_dict())
    temb = mlp("timestep_embedder", psi(t)) + mlp("text_embedder", c)
    if embedded is not None:
        temb = temb + mlp("guidance_embedder", psi(1000 * embedded))
    return temb + mlp("timestep_embedder", psi(1000 * s)) * mlp("text_embedder", c - null)


def test_the_fused_forward_is_the_stock_one_with_the_formula_as_its_conditioning(teacher: Teacher) -> None:
    """The whole transformer in float64, its conditioning once fused and once worked out by hand and put in."""
    transformer = teacher.pipeline.transformer.double()
    text, null = teacher.encode(["a red star", "a box"]), teacher.encode([""])
    tokens, pooled, null_P = (value.double() for value in (text.tokens_BTE, text.pooled_BP, null.pooled_BP[0]))
    x = torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(0)).double()
    stock, s, t = transformer.time_text_embed, [2.0, 6.5], 437.5
    embedded = 3.5 if hasattr(stock, "guidance_embedder") else None
    temb = torch.stack([by_hand(stock, t, pooled[b], null_P, s[b], embedded) for b in range(2)])
    fuse(transformer, make_fusion("paper", embedded_guidance=3.5))
    fused = transformer.time_text_embed
    got = teacher.family.velocity(transformer, x, torch.tensor(t), tokens, pack(pooled, null_P, torch.tensor(s)))
    transformer.time_text_embed = Constant(temb)
    expected = teacher.family.velocity(transformer, x, torch.tensor(t), tokens, pooled)
    transformer.time_text_embed = fused
    # psi is computed in float32, of arguments up to 6,500
    torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)
    assert float((got - expected).norm() / expected.norm()) < 1e-3


@torch.no_grad()
def test_a_balanced_term_starts_as_large_as_the_conditioning_it_joins(teacher: Teacher) -> None:
    stock = teacher.pipeline.transformer.time_text_embed
    pooled, null, s, t = torch.randn(64, 32), torch.randn(32), torch.linspace(1, 7, 64), torch.linspace(1000.0, 0.0, 64)
    width = stock.text_embedder.linear_1.in_features
    pooled, null = pooled[:, :width], null[:width]
    embedded = [torch.full([64], 3500.0)] if hasattr(stock, "guidance_embedder") else []
    temb = stock(t, *embedded, pooled)
    sizes = measure_sizes(stock, pooled, null, s, embedded_guidance=3.5)
    fusion = make_fusion("balanced", embedded_guidance=3.5, **sizes)
    term = FusedConditioning(stock, fusion)(t, *embedded, pack(pooled, null, s)) - temb
    assert float(term.norm() / temb.norm()) == pytest.approx(1.0, rel=1e-3)


class Constant(torch.nn.Module):
    """Gives the same conditioning whatever it is asked."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *ignored: Tensor) -> Tensor:
        return self.value


def test_our_velocities_sample_the_stock_pipelines_picture(teacher: Teacher) -> None:
    """Walking the grid with our Euler and CFG ends in the latents that the stock pipeline gives for the same noise."""
    prompts, s, steps = ["a red star"], 3.0, 4
    chosen = make_strategy(StrategySettings(num_steps=steps))
    grid = teacher.grid(steps)
    noise = torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    x, denoiser = noise, teacher.denoiser(teacher.encode(prompts), teacher.encode([""]))
    for i in range(steps):
        x = chosen.step(denoiser, grid, x, i, torch.tensor([s])).x_next_BCHW
    flux = teacher.family.name == "flux"
    channels, height, width = teacher.latent_shape
    packed = FluxPipeline._pack_latents(noise, 1, channels, height, width) if flux else noise
    stock = teacher.pipeline(
        prompts,
        latents=packed,
        num_inference_steps=steps,
        height=16,
        width=16,
        max_sequence_length=12,
        output_type="latent",
        **teacher.family.guidance_options(s, 1),
    ).images
    if flux:
        stock = FluxPipeline._unpack_latents(stock, height, width, vae_scale_factor=1)
    torch.testing.assert_close(x, stock, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "values",
    [{"name": "euler_cfg"}, {"name": "z_sampling"}, {"name": "z_sampling", "inverse": "official"}, {"name": "w2sd"}],
)
def test_every_strategy_runs(teacher: Teacher, values: dict[str, Any]) -> None:
    chosen = make_strategy(StrategySettings(num_steps=3, **values))
    grid, denoiser = teacher.grid(3), teacher.denoiser(teacher.encode(["a red star", "a box"]), teacher.encode([""]))
    x = torch.randn(2, *teacher.latent_shape)
    counted: list[int] = []
    hook = teacher.pipeline.transformer.register_forward_hook(lambda module, args, out: counted.append(len(out[0])))
    for i in range(3):
        x = chosen.step(denoiser, grid, x, i, torch.tensor([2.0, 5.0])).x_next_BCHW
    hook.remove()
    assert bool(torch.isfinite(x).all())
    assert sum(counted) == 2 * chosen.forwards(3)


def test_teacher_to_student_to_disk_to_student(teacher: Teacher, tmp_path: Path) -> None:
    stock_class = type(teacher.pipeline.transformer)
    fusion = make_fusion("paper", embedded_guidance=3.5)
    before = {name: value.clone() for name, value in teacher.pipeline.transformer.state_dict().items()}
    student = make_student(teacher.pipeline, fusion, max_sequence_length=12)
    save_student(student, tmp_path / "student")
    copy = load_student(tmp_path / "student")
    assert isinstance(copy, StudentPipeline)
    assert isinstance(copy, type(teacher.pipeline))
    options = {"guidance_scale": 5.0, "num_inference_steps": 3, "height": 16, "width": 16, "output_type": "latent"}
    calls: list[int] = []
    copy.transformer.register_forward_hook(lambda module, args, out: calls.append(len(out[0])))
    ours, again = (
        pipe(["a red star", "a box"], generator=torch.Generator().manual_seed(1), **options).images
        for pipe in (student, copy)
    )
    assert torch.equal(ours, again)
    assert calls == [2, 2, 2]
    other = copy("a box", generator=torch.Generator().manual_seed(1), **(options | {"guidance_scale": 2.0})).images
    assert not torch.allclose(other[0], again[1])
    stock = stock_class.from_pretrained(tmp_path / "student", subfolder="transformer")
    assert all(torch.equal(value, before[name]) for name, value in stock.state_dict().items())


def test_a_student_of_each_family_is_served_with_one_guidance_scale_a_picture(teacher: Teacher, tmp_path: Path) -> None:
    fusion = make_fusion("affine", embedded_guidance=3.5)
    save_student(make_student(teacher.pipeline, fusion, max_sequence_length=12), tmp_path / "student")
    overrides = {"device": "cpu", "serve.sizes": ["16x16"], "serve.num_steps": 2}
    served = load_served(str(tmp_path / "student"), load_settings(overrides=overrides))
    pictures = [Picture(served, "a box", s, 1, 2, (16, 16)) for s in (2.0, 5.0)]
    together = [np.asarray(image).astype(int) for image in served.draw(pictures)]
    alone = [np.asarray(served.draw([picture])[0]).astype(int) for picture in pictures]
    assert max(abs(one - other).max() for one, other in zip(together, alone, strict=True)) <= 1
    assert (together[0] != together[1]).any()


def test_a_student_refuses_what_it_cannot_do(teacher: Teacher) -> None:
    student = make_student(teacher.pipeline, make_fusion("paper"), max_sequence_length=12)
    with pytest.raises(ValueError, match="no negative prompt"):
        student("a", negative_prompt="ugly", num_inference_steps=1, height=16, width=16)
    if teacher.family.name == "flux":
        with pytest.raises(ValueError, match="needs no true CFG"):
            student("a", true_cfg_scale=3.0, num_inference_steps=1, height=16, width=16)


def test_a_size_that_does_not_divide_is_refused(teacher: Teacher) -> None:
    with pytest.raises(TeacherError, match="must be multiples of 4 pixels"):
        teacher.family.latent_shape(teacher.pipeline, 18, 16)


@pytest.mark.parametrize("name", ["PixArtTransformer2DModel", "SanaTransformer2DModel", "QwenImageTransformer2DModel"])
def test_a_transformer_without_pooled_text_is_refused(name: str) -> None:
    with pytest.raises(TeacherError, match=f"{name} cannot be fused: .*pooled text"):
        family_of(name, TeacherSettings())
