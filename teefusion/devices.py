"""Which device a stage computes on, and what is done for speed where that is a CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from teefusion.errors import SettingsError


def resolve_device(name: str) -> str:
    """``auto`` is a GPU where there is one. Raises SettingsError for a device this machine lacks."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device {name!r} is not usable on this machine: {error}. Try --set device=cpu.") from error
    return str(device)


def local_device(name: str) -> str:
    """``resolve_device``, where ``auto`` and ``cuda`` are this rank's own GPU under torchrun."""
    rank = os.environ.get("LOCAL_RANK")
    if rank and name in ("auto", "cuda") and torch.cuda.is_available():
        return f"cuda:{rank}"
    return resolve_device(name)


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Attention as two matrix products, for training on a CPU.

    At the lengths a CPU can train (80 tokens here), the fused kernel's backward pass in bfloat16 takes five times as
    long as all of this. The flag keeps the products in bfloat16, for another sixth of a step.
    """
    before = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)  # in "cuda" by name only
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(before)
