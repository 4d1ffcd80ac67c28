"""The fused conditioning against the formula written out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from teefusion.fusion import FusedConditioning, Fusion, Variant, fuse, make_fusion, measure_sizes, pack
from tests.by_hand import mlps, psi


@pytest.fixture
def transformer(tiny_teacher: Path) -> Any:
    return SD3Transformer2DModel.from_pretrained(tiny_teacher / "transformer")


def by_hand(state: dict[str, Tensor], t: float, c: Tensor, null: Tensor, s: float, fusion: Fusion) -> Tensor:
    """Temb of one picture, in float64, from the weights alone."""
    mlp = mlps({name.removeprefix("time_text_embed."): value for name, value in state.items()})
    scale = psi(fusion.frequency * (s - 1 if fusion.convention == "w" else s))
    direction = c.double() - null.double()
    time, text = mlp("timestep_embedder", psi(t)), mlp("text_embedder", c.double())
    if fusion.variant == "affine":
        return time + text + (s - 1) * mlp("timestep_embedder", psi(t + 5000)) / fusion.divisor
    if fusion.variant == "linear":
        return time + mlp("text_embedder", c.double() + (s - 1) * direction)
    if fusion.variant == "unmodulated":
        return time + text + mlp("text_embedder", direction)
    if fusion.variant == "distill_cfg":
        return time + text + mlp("scale_embedder", scale)
    return time + text + mlp("timestep_embedder", scale) * mlp("text_embedder", direction) / fusion.divisor


@pytest.mark.parametrize("convention", ["s", "w"])
@pytest.mark.parametrize("variant", get_args(Variant))
def test_fused_conditioning_is_the_formula(transformer: Any, variant: Any, convention: Any) -> None:
    torch.manual_seed(0)
    fusion = make_fusion(variant, convention=convention, term_rms=3.0, temb_rms=2.0)
    fuse(transformer, fusion)
    if fusion.adds_parameters:  # zero at the start
        torch.nn.init.normal_(transformer.time_text_embed.scale_embedder.linear_2.weight, std=0.1)
    state = transformer.state_dict()
    pooled, null = torch.randn(3, 32), torch.randn(32)
    scale, t = torch.tensor([1.0, 4.5, 20.0]), torch.tensor([1000.0, 437.5, 8.93])
    got = transformer.time_text_embed(t, pack(pooled, null, scale))
    expected = torch.stack([by_hand(state, float(t[k]), pooled[k], null, float(scale[k]), fusion) for k in range(3)])
    # float32 sinusoids of arguments up to 20,000 carry about 1e-3 of rounding
    torch.testing.assert_close(got.double(), expected, atol=2e-3, rtol=2e-3)


def test_published_divides_by_256_and_paper_does_not() -> None:
    assert (make_fusion("published").frequency, make_fusion("published").divisor) == (1000.0, 256.0)
    assert (make_fusion("paper").frequency, make_fusion("paper").divisor) == (1000.0, 1.0)


@pytest.mark.parametrize("variant", ["affine", "balanced"])
def test_two_variants_are_divided_by_the_ratio_of_sizes(variant: Any) -> None:
    assert make_fusion(variant, term_rms=6.0, temb_rms=1.5).divisor == 4.0


@torch.no_grad()
@pytest.mark.parametrize("variant", ["affine", "balanced"])
def test_their_term_starts_as_large_as_the_conditioning(transformer: Any, variant: Any) -> None:
    torch.manual_seed(0)
    pooled, null, scale = torch.randn(64, 32), torch.randn(32), torch.linspace(1, 7, 64)
    stock = transformer.time_text_embed
    sizes = measure_sizes(stock, pooled, null, scale, variant=variant)
    t = torch.linspace(1000.0, 0.0, 64)
    temb = stock(t, pooled)
    fused = FusedConditioning(stock, make_fusion(variant, **sizes))(t, pack(pooled, null, scale))
    ratio = (fused - temb).square().mean().sqrt() / temb.square().mean().sqrt()
    assert ratio.item() == pytest.approx(1.0, rel=1e-4)


def test_fusing_adds_no_parameter_and_keeps_every_name_and_shape(transformer: Any) -> None:
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    fuse(transformer, make_fusion("published"))
    after = transformer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_distill_cfg_adds_a_guidance_mlp_that_starts_silent(transformer: Any) -> None:
    pooled, t = torch.randn(2, 32), torch.tensor([500.0, 20.0])
    before, stock = list(transformer.state_dict()), transformer.time_text_embed(t, pooled)
    fuse(transformer, make_fusion("distill_cfg"))
    added = set(transformer.state_dict()) - set(before)
    assert added == {f"time_text_embed.scale_embedder.linear_{k}.{kind}" for k in (1, 2) for kind in ("weight", "bias")}
    fused = transformer.time_text_embed(t, pack(pooled, torch.zeros(32), torch.tensor([1.0, 7.0])))
    torch.testing.assert_close(fused, stock)


@pytest.mark.parametrize("variant", ["affine", "linear"])
def test_two_variants_are_the_teacher_at_scale_one(transformer: Any, variant: Any) -> None:
    pooled, t = torch.randn(2, 32), torch.tensor([500.0, 20.0])
    stock = transformer.time_text_embed(t, pooled)
    fuse(transformer, make_fusion(variant))
    torch.testing.assert_close(transformer.time_text_embed(t, pack(pooled, torch.randn(32), torch.ones(2))), stock)


def test_fused_weights_load_into_the_stock_class(transformer: Any) -> None:
    fuse(transformer, make_fusion("paper"))
    stock = SD3Transformer2DModel.from_config(transformer.config)
    assert stock.load_state_dict(transformer.state_dict(), strict=True).missing_keys == []


def test_guidance_keeps_float32_precision_in_a_bfloat16_model(transformer: Any) -> None:
    """bfloat16 would round 1000 * 7.5 and 1000 * 7.51 to one number."""
    fuse(transformer.to(torch.bfloat16), make_fusion("paper"))
    pooled, t = torch.randn(1, 32, dtype=torch.bfloat16), torch.tensor([500.0])
    near = [transformer.time_text_embed(t, pack(pooled, pooled[0] * 0, torch.tensor([s]))) for s in (7.5, 7.51)]
    assert near[0].dtype == torch.bfloat16
    assert not torch.equal(*near)


@pytest.mark.parametrize(("s", "argument"), [(2.5, 2496.0), (3.5, 3504.0), (5.0, 4992.0), (7.5, 7488.0)])
def test_rounding_on_request_is_the_authors(transformer: Any, s: float, argument: float) -> None:
    """The four values that bfloat16 makes of 1000 g."""
    exact = make_fusion("published").model_copy(update={"divisor": 1.0})
    pooled, t = torch.randn(1, 32), torch.tensor([500.0])
    fuse(transformer, exact.model_copy(update={"rounded": True}))
    rounded = transformer.time_text_embed(t, pack(pooled, pooled[0] * 0, torch.tensor([s])))
    transformer.time_text_embed.fusion = exact
    by_hand = transformer.time_text_embed(t, pack(pooled, pooled[0] * 0, torch.tensor([argument / 1000])))
    torch.testing.assert_close(rounded, by_hand, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(rounded, transformer.time_text_embed(t, pack(pooled, pooled[0] * 0, torch.tensor([s]))))


def test_unpacked_text_is_refused_with_the_width_it_needs(transformer: Any) -> None:
    fuse(transformer, make_fusion("paper"))
    with pytest.raises(ValueError, match="width 65"):
        transformer.time_text_embed(torch.tensor([1.0]), torch.zeros(1, 32))


def test_fusing_twice_is_refused(transformer: Any) -> None:
    fuse(transformer, make_fusion("paper"))
    with pytest.raises(ValueError, match="fused already"):
        fuse(transformer, make_fusion("paper"))
