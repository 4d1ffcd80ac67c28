"""Which device a stage computes on."""

from __future__ import annotations

import torch

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
