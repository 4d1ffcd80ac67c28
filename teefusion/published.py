"""Read students in the format of the authors' release, without running the code that comes with it.

Such a folder is a diffusers folder whose transformer config says ``txt_align_guidance: true`` and ``guidance: false``
and names classes of its own. Its weights are those of the stock SD3Transformer2DModel, name by name; what its class
adds is the fused term, which is ``fusion.variant: published`` here.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel

from teefusion.errors import StudentError
from teefusion.loading import load_models

_FLAG, _OTHER_FLAG = "txt_align_guidance", "guidance"


def is_published(source: Path | str, index: dict[str, Any], **hub: Any) -> bool:
    """Whether a folder or hub id is a student in that format."""
    if "fusion" in index or "transformer" not in index:
        return False
    try:
        config = SD3Transformer2DModel.load_config(source, subfolder="transformer", **hub)
    except (OSError, ValueError):
        return False
    return config.get(_FLAG) is True and not config.get(_OTHER_FLAG)


def published_parts(source: Path | str, index: dict[str, Any], *, dtype: torch.dtype, **hub: Any) -> dict[str, Any]:
    """All parts of its pipeline, by name; None for those that the folder lists as absent. Raises StudentError."""
    index = index | {"transformer": ["diffusers", SD3Transformer2DModel.__name__]}
    models = load_models(source, index, dtype=dtype, error=StudentError, **hub)
    parts: dict[str, Any] = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or name in models:
            continue
        if entry[0] is None:
            parts[name] = None
            continue
        try:
            kind: Any = getattr(importlib.import_module(entry[0]), entry[1])
        except (ImportError, AttributeError) as error:
            raise StudentError(
                f"{source}: {name} is a {entry[0]}.{entry[1]}, which neither diffusers nor transformers has. Code that "
                "comes with a model is not run."
            ) from error
        parts[name] = kind.from_pretrained(source, subfolder=name, **hub)
    return parts | models
