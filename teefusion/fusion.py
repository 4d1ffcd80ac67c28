"""The equation: guidance scale and text direction fused into the vector that conditions the transformer.

TeEFusion (ICCV 2025, arXiv 2507.18192) replaces the stock conditioning ``G(psi(t)) + F(c)`` by

    temb = G(psi(t)) + F(c) + G(psi(frequency * g)) * F(c - null) / divisor

and this project's default, ``affine``, by a term in which the scale is a factor, as it is in guidance itself:

    temb = G(psi(t)) + F(c) + (s - 1) * G(psi(t + 5000)) / divisor

with ``psi`` the sinusoid, ``G`` the timestep MLP, ``F`` the pooled-text MLP, ``c`` and ``null`` the pooled embeddings
of the prompt and of the empty prompt, ``g`` the guidance. All of ``G`` and ``F`` is the teacher's: no new parameter.
The other variants are the paper's ablations, and DistillCFG, its baseline with a guidance MLP of its own.

Axes: B = pictures in the batch, P = width of the pooled text, D = width of the conditioning vector.
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

Variant = Literal["affine", "published", "paper", "balanced", "linear", "unmodulated", "distill_cfg"]
Convention = Literal["s", "w"]
_BEYOND = 5000.0  # timesteps end at 1000; G is the guidance's from here on, and is not pulled two ways by one input
SCALE_EMBEDDER = "scale_embedder"
"""The one module that a variant adds: DistillCFG's MLP, in ``time_text_embed``."""


class Fusion(BaseModel):
    """Constants of the fused term; saved with every student, since its weights mean nothing without them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: Variant
    convention: Convention = "s"
    """What ``g`` is: diffusers' guidance scale ``s``, or the paper's ``w = s - 1``; the authors state neither."""
    frequency: float = Field(default=1000.0, gt=0)
    """What ``g`` is multiplied with before the sinusoid; timesteps run to 1000, so 1000 spreads ``g`` over it."""
    divisor: float = Field(default=1.0, gt=0)
    """What the term is divided by."""
    embedded_guidance: float = 1.0
    """What the guidance embedder of a FLUX.1 dev type teacher is fed, always; nothing to other teachers."""
    rounded: bool = False
    """Whether ``g`` and then its product with the frequency are rounded to bfloat16, as the authors' pipeline does in a
    bfloat16 model: 7.5 becomes 7488, not 7500."""

    @property
    def adds_parameters(self) -> bool:
        """Whether a student has weights that its teacher has not."""
        return self.variant == "distill_cfg"


def make_fusion(
    variant: Variant,
    *,
    convention: Convention = "s",
    term_rms: float = 1.0,
    temb_rms: float = 1.0,
    embedded_guidance: float = 1.0,
) -> Fusion:
    """Constants of a variant. The two sizes, measured on the teacher, are used by ``affine`` and ``balanced`` alone.

    affine       the term is G at a timestep beyond all others, times s - 1: at s = 1 the student starts as the teacher,
                 and past the range it was taught it goes on in the same direction; sized as ``balanced``. Of all
                 terms without parameters that were tried it learns best (docs/method.md)
    published    x1000 and /256, the factors of the authors' released pipeline, which their formula does not show
    paper        the formula as printed, with no divisor
    balanced     the printed formula, divided so that the term starts as large as the conditioning it is added to, in
                 teachers of any size: /256 starves a small teacher of the signal (docs/method.md)
    linear       the paper's ablation without the sinusoid: ``F(c + w (c - null))`` in place of ``F(c)``
    unmodulated  the paper's ablation without the scale: the term is ``F(c - null)`` alone
    distill_cfg  the baseline of Meng et al. (arXiv 2210.03142): the term is an MLP of psi(frequency * g), added
                 parameters whose last layer starts at zero
    """
    sized = term_rms / temb_rms
    divisor = {"published": 256.0, "balanced": sized, "affine": sized}.get(variant, 1.0)
    return Fusion(variant=variant, convention=convention, divisor=divisor, embedded_guidance=embedded_guidance)


def pack(pooled_BP: Tensor, null_P: Tensor, guidance_B: Tensor) -> Tensor:
    """One conditioning tensor [B, 2P + 1] of pooled text, null text and guidance scale, float32.

    The stock transformer hands ``pooled_projections`` to its conditioning module and to nothing else, so what travels
    inside it needs no global state: a forward stays correct under torch.compile, gradient checkpointing, sharding and
    threads. float32 because a guidance scale in bfloat16 keeps three digits.
    """
    count = pooled_BP.shape[0]
    null_BP = null_P.float().expand(count, -1)
    guidance_B1 = guidance_B.to(pooled_BP.device, torch.float32).expand(count)[:, None]
    return torch.cat([pooled_BP.float(), null_BP, guidance_B1], dim=-1)


class FusedConditioning(nn.Module):
    """Takes the place of a transformer's ``time_text_embed``, reuses its modules, and keeps their parameter names.

    So a student's state dict is the teacher's, name by name and shape by shape, and loads into the stock class; that
    of the ``distill_cfg`` variant has a ``scale_embedder`` more.
    """

    time_proj: Any
    timestep_embedder: Any
    text_embedder: Any

    def __init__(self, stock: Any, fusion: Fusion) -> None:
        super().__init__()
        self.time_proj = stock.time_proj
        self.timestep_embedder = stock.timestep_embedder
        self.text_embedder = stock.text_embedder
        self.fusion = fusion
        self.pooled_width = int(self.text_embedder.linear_1.in_features)
        self.guidance_embedder = getattr(stock, "guidance_embedder", None)
        self.scale_embedder = _silent_copy(self.timestep_embedder) if fusion.adds_parameters else None

    def forward(self, timestep: Tensor, *others: Tensor) -> Tensor:
        """Conditioning [B, D] from timesteps [B] in 0..1000 and, last, the tensor [B, 2P + 1] made by ``pack``.

        A FLUX transformer of the dev type passes guidance [B] between the two; ``embedded_guidance`` takes its place.
        """
        packed = others[-1]
        width = self.pooled_width
        if packed.shape[-1] != 2 * width + 1:
            raise ValueError(
                f"A fused transformer needs pooled_projections of width {2 * width + 1} (pooled text, null text and "
                f"guidance, made by teefusion.fusion.pack), got {packed.shape[-1]}. Use a TeEFusion pipeline."
            )
        pooled_BP, null_BP, guidance_B1 = packed.split([width, width, 1], dim=-1)
        direction_BP = pooled_BP - null_BP
        if self.fusion.variant == "linear":
            pooled_BP = pooled_BP + (guidance_B1 - 1.0) * direction_BP
        time_BD = self._time(timestep)
        temb_BD = time_BD.float() + self._text(pooled_BP).float()
        if self.guidance_embedder is not None:
            embedded_B = torch.full_like(guidance_B1[:, 0], self.fusion.embedded_guidance * 1000.0)
            temb_BD = temb_BD + self._time(embedded_B, self.guidance_embedder).float()
        if self.fusion.variant != "linear":
            temb_BD = temb_BD + self._term(timestep, direction_BP, guidance_B1[:, 0])
        return temb_BD.to(time_BD.dtype)

    def _term(self, timestep: Tensor, direction_BP: Tensor, s_B: Tensor) -> Tensor:
        """What is added to the stock conditioning [B, D], float32."""
        fusion = self.fusion
        if fusion.variant == "unmodulated":
            return self._text(direction_BP).float() / fusion.divisor
        if fusion.variant == "affine":
            return (s_B - 1.0)[:, None] * self._time(timestep.float() + _BEYOND).float() / fusion.divisor
        g_B = s_B - 1.0 if fusion.convention == "w" else s_B
        g_B = (g_B.bfloat16() * fusion.frequency).float() if fusion.rounded else g_B * fusion.frequency
        if self.scale_embedder is not None:
            return self._time(g_B, self.scale_embedder).float()
        # The product of two large numbers over a divisor: float32, as bfloat16 would round the small result away.
        return self._time(g_B).float() * self._text(direction_BP).float() / fusion.divisor

    def _time(self, value_B: Tensor, embedder: Any = None) -> Tensor:
        embedder = embedder or self.timestep_embedder
        return embedder(self.time_proj(value_B).to(embedder.linear_1.weight.dtype))  # type: ignore[no-any-return]

    def _text(self, pooled_BP: Tensor) -> Tensor:
        return self.text_embedder(pooled_BP.to(self.text_embedder.linear_1.weight.dtype))  # type: ignore[no-any-return]


def _silent_copy(embedder: Any) -> Any:
    """An MLP of the same shape whose output is zero until it is trained, and whose first layer is the original's."""
    copied = copy.deepcopy(embedder)
    nn.init.zeros_(copied.linear_2.weight)
    nn.init.zeros_(copied.linear_2.bias)
    return copied


@torch.no_grad()
def measure_sizes(
    stock: Any,
    pooled_BP: Tensor,
    null_P: Tensor,
    guidance_B: Tensor,
    *,
    variant: Variant = "paper",
    convention: Convention = "s",
    embedded_guidance: float = 1.0,
) -> dict[str, float]:
    """Root mean squares of the variant's undivided fused term and of the conditioning it joins, over the given prompts.

    Returns ``term_rms`` and ``temb_rms`` for ``make_fusion``. Timesteps run evenly over 1000..0.
    """
    shape: Variant = "affine" if variant == "affine" else "paper"  # the two that are measured
    fusion = make_fusion(shape, convention=convention, embedded_guidance=embedded_guidance)
    probe = FusedConditioning(stock, fusion)
    timestep_B = torch.linspace(1000.0, 0.0, pooled_BP.shape[0], device=pooled_BP.device)
    term_BD = probe._term(timestep_B, pooled_BP - null_P, guidance_B)
    fused_BD = probe(timestep_B, pack(pooled_BP, null_P, guidance_B)).float()
    return {"term_rms": _rms(term_BD), "temb_rms": _rms(fused_BD - term_BD)}


def _rms(values: Tensor) -> float:
    return float(values.square().mean().sqrt())


def fuse(transformer: Any, fusion: Fusion) -> Any:
    """Swap the conditioning module in place; the transformer then takes ``pack(...)`` as pooled_projections."""
    if isinstance(transformer.time_text_embed, FusedConditioning):
        raise ValueError("This transformer is fused already.")
    before = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    transformer.time_text_embed = FusedConditioning(transformer.time_text_embed, fusion)
    after = {name: tuple(value.shape) for name, value in transformer.state_dict().items()}
    added = {name for name in after if name.startswith(f"time_text_embed.{SCALE_EMBEDDER}.")}
    assert before == {name: shape for name, shape in after.items() if name not in added}, "names and shapes stay"
    assert bool(added) == fusion.adds_parameters, "only distill_cfg adds parameters"
    return transformer


def fusion_from_config(config: dict[str, Any]) -> Fusion:
    """Constants as stored with a student. Raises pydantic's ValidationError for anything else."""
    return Fusion.model_validate(config)
