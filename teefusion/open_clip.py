"""open_clip's names for a CLIP, and the same weights under transformers' names.

open_clip keeps query, key and value of a block in one matrix, and its projections as matrices that are multiplied from
the right; transformers has three linear layers, and linear layers. Nothing else differs but names. The facts are from
open_clip's model.py and transformer.py and its ViT-H-14.json; no code is.

Axes: D = width of a tower, M = width of its MLP, P = width of the shared embedding, N = tokens, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from teefusion.errors import ScorerError

_NAMED = 3  # names in a message


@dataclass(frozen=True)
class Tower:
    """Transformer blocks of one tower."""

    width: int
    layers: int
    heads: int
    """Not told by the shapes of the weights."""

    @property
    def mlp_width(self) -> int:
        """M; four times the width in every published ViT of open_clip's but the giant ones."""
        return 4 * self.width


@dataclass(frozen=True)
class Architecture:
    """A CLIP of open_clip's: a ViT for pictures, a causal transformer for text, pooled at the end-of-text token."""

    text: Tower
    vision: Tower
    embedding: int
    image_size: int
    patch_size: int
    context: int = 77
    vocabulary: int = 49408
    end_of_text: int = 49407
    """The last token of CLIP's vocabulary, so that open_clip's argmax finds it."""
    activation: str = "gelu"
    """The exact one. `quick_gelu` is OpenAI's own checkpoints' only."""

    @property
    def image_tokens(self) -> int:
        """The class token and the patches."""
        return 1 + (self.image_size // self.patch_size) ** 2


VIT_H_14 = Architecture(
    text=Tower(width=1024, layers=24, heads=16),
    vision=Tower(width=1280, layers=32, heads=16),
    embedding=1024,
    image_size=224,
    patch_size=14,
)
"""HPS v2's and PickScore's: 986 million parameters."""


def layout(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape in open_clip's state dict."""
    a, text, vision = architecture, architecture.text.width, architecture.vision.width
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (a.context, text),
        "text_projection": (text, a.embedding),
        "token_embedding.weight": (a.vocabulary, text),
        "visual.class_embedding": (vision,),
        "visual.positional_embedding": (a.image_tokens, vision),
        "visual.proj": (vision, a.embedding),
        "visual.conv1.weight": (vision, 3, a.patch_size, a.patch_size),
    }
    for norm, width in (("ln_final", text), ("visual.ln_pre", vision), ("visual.ln_post", vision)):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for prefix, tower in (("transformer", a.text), ("visual.transformer", a.vision)):
        for k in range(tower.layers):
            shapes |= {f"{prefix}.resblocks.{k}.{name}": shape for name, shape in _block_shapes(tower)}
    return shapes


def convert(weights: Mapping[str, Tensor], architecture: Architecture, *, where: str) -> dict[str, Tensor]:
    """The same weights as transformers' CLIPModel names and shapes them, float32.

    Raises ScorerError naming ``where``, for weights that are missing, unknown, or of another shape.
    """
    _check(weights, architecture, where)
    converted: dict[str, Tensor] = {}
    for name, weight in weights.items():
        converted |= {theirs: value.float().contiguous() for theirs, value in _renamed(name, weight)}
    return converted


def clip_config(architecture: Architecture) -> Any:
    """A CLIPConfig of transformers' for it."""
    from transformers import CLIPConfig

    a = architecture
    text = _tower_config(a.text, a.activation) | {
        "vocab_size": a.vocabulary,
        "max_position_embeddings": a.context,
        # transformers pools at the first token of this id; open_clip at the first of the largest id, which is the same.
        "bos_token_id": a.end_of_text - 1,
        "eos_token_id": a.end_of_text,
        "pad_token_id": 0,
    }
    vision = _tower_config(a.vision, a.activation) | {"image_size": a.image_size, "patch_size": a.patch_size}
    shared = {"projection_dim": a.embedding}
    return CLIPConfig(text_config=text | shared, vision_config=vision | shared, **shared)


def _tower_config(tower: Tower, activation: str) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": tower.mlp_width,
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "hidden_act": activation,
        "layer_norm_eps": 1e-5,
    }


def _block_shapes(tower: Tower) -> Iterator[tuple[str, tuple[int, ...]]]:
    D, M = tower.width, tower.mlp_width
    yield from (("attn.in_proj_weight", (3 * D, D)), ("attn.in_proj_bias", (3 * D,)))
    yield from (("attn.out_proj.weight", (D, D)), ("attn.out_proj.bias", (D,)))
    yield from (("mlp.c_fc.weight", (M, D)), ("mlp.c_fc.bias", (M,)))
    yield from (("mlp.c_proj.weight", (D, M)), ("mlp.c_proj.bias", (D,)))
    for norm in ("ln_1", "ln_2"):
        yield from ((f"{norm}.weight", (D,)), (f"{norm}.bias", (D,)))


_OUTER = {
    "logit_scale": "logit_scale",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",  # transformers' spelling
    "visual.ln_post": "vision_model.post_layernorm",
}
_PROJECTIONS = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_TOWERS = {"transformer": "text_model", "visual.transformer": "vision_model"}
_INNER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def _renamed(name: str, weight: Tensor) -> Iterator[tuple[str, Tensor]]:
    """One weight of open_clip's, under transformers' names: three of them for a fused matrix or bias."""
    tower, block, inner = name.partition(".resblocks.")
    if block:
        k, _, inner = inner.partition(".")
        layer = f"{_TOWERS[tower]}.encoder.layers.{k}"
        if inner.startswith("attn.in_proj_"):
            kind = inner.removeprefix("attn.in_proj_")
            for part, value in zip("qkv", weight.chunk(3), strict=True):
                yield f"{layer}.self_attn.{part}_proj.{kind}", value
            return
        module, _, kind = inner.rpartition(".")
        yield f"{layer}.{_INNER[module]}.{kind}", weight
    elif name in _PROJECTIONS:
        yield _PROJECTIONS[name], weight.T
    elif name in _OUTER:
        yield _OUTER[name], weight
    else:
        module, _, kind = name.rpartition(".")
        yield f"{_OUTER[module]}.{kind}", weight


def _check(weights: Mapping[str, Tensor], architecture: Architecture, where: str) -> None:
    expected = layout(architecture)
    missing = sorted(expected.keys() - weights.keys())
    unknown = sorted(weights.keys() - expected.keys())
    if missing or unknown:
        both = (("missing", missing), ("unknown", unknown))
        found = [f"{len(names)} {kind} ({_some(names)})" for kind, names in both if names]
        raise ScorerError(
            f"{where} is not the CLIP it should be, by open_clip's names of its weights: {', '.join(found)}. Nothing "
            "was loaded. Fetch the published file again."
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ScorerError(
                f"{where} is a CLIP of another shape: {name} is {tuple(weights[name].shape)}, expected {shape}. Fetch "
                "the published file again."
            )


def _some(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
