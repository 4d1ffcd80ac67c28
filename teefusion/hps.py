"""HPS v2.0 and v2.1 (arXiv 2306.09341): the published checkpoints as transformers' CLIPModel.

A checkpoint is a pickled dict whose ``state_dict`` is a ViT-H-14 in open_clip's names. It is read with
``weights_only=True``, which runs no code of the file's. The score is the cosine of the two embeddings; the logit scale
is not used.
"""

from __future__ import annotations

import html
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teefusion.errors import ScorerError
from teefusion.open_clip import VIT_H_14, Architecture, clip_config, convert

# ftfy's, which open_clip's tokenizer calls first: all it does to text that was decoded rightly.
_PLAIN = str.maketrans(
    dict.fromkeys("ʼ‘’‚‛", "'")
    | dict.fromkeys("“”„‟", '"')
    | {"ﬀ": "ff", "ﬁ": "fi", "ﬂ": "fl", "ﬃ": "ffi", "ﬄ": "ffl", "ﬅ": "ſt", "ﬆ": "st"}
)
CLEANING = "HTML entities resolved, curly quotes and ligatures made plain"
"""What ``clean`` does to a prompt, for results."""


def load_hps(path: Path, *, architecture: Architecture = VIT_H_14) -> Any:
    """A CLIPModel in evaluation mode, float32. Raises ScorerError for a file that is no such checkpoint."""
    from transformers import CLIPModel

    converted = convert(read_checkpoint(path), architecture, where=str(path))
    model = CLIPModel.from_pretrained(None, config=clip_config(architecture), state_dict=converted, dtype=torch.float32)
    return model.eval()


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The ``state_dict`` of a checkpoint, its tensors read when they are used. Raises ScorerError."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ScorerError(
            f"{path} cannot be read as an HPS checkpoint: {reason} It should be a file of torch.save that holds "
            "tensors alone. Fetch the published file again."
        ) from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ScorerError(
            f"{path} is no HPS checkpoint: it has no 'state_dict' of tensors. Fetch the published file again."
        )
    return state


def clean(prompt: str) -> str:
    """A prompt as open_clip's tokenizer cleans it, but for mojibake, which is left as it is.

    Whitespace and case are the tokenizer's own business.
    """
    plain = (prompt if "<" in prompt else html.unescape(prompt)).translate(_PLAIN)
    return html.unescape(html.unescape(plain)).strip()
