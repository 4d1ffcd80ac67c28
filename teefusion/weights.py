"""Further weights that a strategy compares the teacher with: a second transformer, a LoRA of the teacher's own.

Axes: I, O = inputs and outputs of a layer, R = rank of a LoRA.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from teefusion.errors import TeacherError
from teefusion.settings import StrategySettings, TeacherSettings, WeightsSource
from teefusion.sources import revision_of
from teefusion.teachers import LORA_ADAPTER, Teacher, load_transformer

_LORA_KEY = re.compile(r"transformer\.(?P<layer>.+)\.(?P<side>lora_A|lora_B|lora\.down|lora\.up)\.weight")


def with_weights(teacher: Teacher, strategy: StrategySettings) -> Teacher:
    """The teacher with all weights that the strategy's legs name.

    Raises TeacherError for a second transformer of another shape, a LoRA of another base, or what cannot be loaded.
    """
    if strategy.second is not None:
        teacher = dataclasses.replace(teacher, second=_second(teacher, strategy.second))
    if strategy.lora is not None:
        _add_lora(teacher.pipeline, strategy.lora)
        teacher = dataclasses.replace(teacher, has_lora=True)
    return teacher


def _second(teacher: Teacher, source: WeightsSource) -> Any:
    settings = TeacherSettings(name=source.uri, uri=source.uri, revision=source.revision)
    transformer, _ = load_transformer(settings)
    ours, theirs = _shapes(teacher.pipeline.transformer), _shapes(transformer)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise TeacherError(
                f"strategy.second {source.uri} is another network than the teacher's: {name} is "
                f"{theirs.get(name, 'missing')} there and {ours.get(name, 'missing')} in the teacher. Give a fine-tune "
                "of the same base."
            )
    model = teacher.pipeline.transformer
    return transformer.to(device=model.device, dtype=model.dtype).requires_grad_(False).eval()


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def _add_lora(pipeline: Any, source: WeightsSource) -> None:
    found = revision_of(source)
    if source.revision is not None and found != source.revision:
        raise TeacherError(
            f"strategy.lora {source.uri} has changed: this run was made for revision {source.revision}, found {found}. "
            "Start a new run, or restore it."
        )
    options = {} if Path(source.uri).exists() else {"revision": found}
    try:
        state, metadata = pipeline.lora_state_dict(
            source.uri, use_safetensors=True, return_lora_metadata=True, **options
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise TeacherError(
            f"strategy.lora {source.uri} cannot be read: {error}. Give a .safetensors file, its folder, or a hub id."
        ) from error
    _check_base(pipeline.transformer, state, source.uri)
    try:
        pipeline.load_lora_into_transformer(
            state, transformer=pipeline.transformer, adapter_name=LORA_ADAPTER, metadata=metadata
        )
    except (ImportError, ValueError, RuntimeError, KeyError) as error:  # ImportError: peft is not installed
        raise TeacherError(f"strategy.lora {source.uri} cannot be put on the teacher: {error}") from error
    pipeline.transformer.requires_grad_(False)


def _check_base(transformer: Any, state: dict[str, Tensor], uri: str) -> None:
    """Every tensor must fit a layer of the teacher: diffusers would leave out, with a warning, what does not."""
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}
    for key, value in state.items():
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            raise TeacherError(
                f"strategy.lora {uri}: {key} is no LoRA weight of a transformer. Save it with diffusers' "
                "save_lora_weights, for the transformer alone."
            )
        layer = layers.get(match["layer"])
        if layer is None:
            raise TeacherError(f"strategy.lora {uri} is of another base: the teacher has no layer {match['layer']}.")
        down = match["side"] in ("lora_A", "lora.down")  # [R, I]; the other side is [O, R]
        found, expected = (value.shape[1], layer.in_features) if down else (value.shape[0], layer.out_features)
        if found != expected:
            raise TeacherError(
                f"strategy.lora {uri} is of another base: {key} has width {found}, the teacher's layer {expected}."
            )
