"""Peak memory of a piece of work: of the device where that is a GPU, else of this process."""

from __future__ import annotations

import resource
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")


def memory_kind(device: str) -> str:
    """What ``peak_bytes`` counts, in words."""
    return "allocated on the device" if device.startswith("cuda") else "resident in the process"


def reset_peak(device: str) -> None:
    """Begin anew. Where the system has no such thing, a process's peak stays that of its whole life."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        _CLEAR.write_text("5")  # Linux: resets VmHWM
    except OSError:
        return


def peak_bytes(device: str) -> int:
    """Most bytes at once since ``reset_peak``, all that is loaded included."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = _STATUS.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) << 10
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
