"""Load the models of a diffusers pipeline folder, and refuse one whose weights are incomplete.

diffusers and transformers fill a weight that a folder lacks with random numbers and go on with a warning.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from teefusion.errors import TeEFusionError

_LIBRARIES = ("diffusers", "transformers")


def load_models(
    source: Path | str,
    index: Mapping[str, Any],
    *,
    dtype: torch.dtype,
    error: type[TeEFusionError],
    only: Collection[str] | None = None,
    besides: Collection[str] = (),
    **options: Any,
) -> dict[str, nn.Module]:
    """The models that ``index`` (a model_index.json) lists, by name; all but ``besides``, or ``only`` some.

    ``options`` go to ``from_pretrained``, as ``revision`` for a hub id. Raises ``error`` for a model with missing
    weights, and what the libraries raise for one that they cannot load.
    """
    models = {}
    for name, entry in index.items():
        if name in besides or (only is not None and name not in only):
            continue
        if not (isinstance(entry, list) and entry[0] in _LIBRARIES):
            continue
        kind = getattr(importlib.import_module(entry[0]), entry[1], None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
            continue  # a tokenizer, a scheduler
        loader: Any = kind
        model, info = loader.from_pretrained(
            source, subfolder=name, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
        )
        missing = sorted(info["missing_keys"])
        if missing:
            raise error(
                f"{source} is incomplete: {name} lacks {len(missing)} of its weights, {missing[0]} for one. Nothing "
                "was loaded. Fetch or save the folder again."
            )
        models[name] = model
    return models
