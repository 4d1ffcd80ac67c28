"""Peak memory of a piece of work: of the device where that is a GPU, else of this process (Linux)."""

from __future__ import annotations

import ctypes
import gc
import resource
from pathlib import Path

import torch

_CLEAR = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_M_MMAP_THRESHOLD = -3  # of malloc.h


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
    return _resident("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


class MemoryMeter:
    """Memory since it was made: of a GPU what torch allocated, of a CPU what was resident (on Linux, else 0)."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._before = 0 if self._cuda else _resident("VmRSS") - _resident("RssFile")

    def reset(self) -> None:
        """Begin a new peak. On a CPU allocations are slower from then on."""
        if self._cuda:
            torch.cuda.reset_peak_memory_stats(self._cuda)
        else:
            return_freed_memory()
            reset_peak("cpu")

    def peak(self) -> int:
        """Bytes, since the last reset."""
        if self._cuda:
            return torch.cuda.max_memory_allocated(self._cuda)
        return _resident("VmHWM") - _resident("RssFile") - self._before  # mapped files need no memory of their own


def return_freed_memory() -> None:
    """To the system, what was freed before and, at the price of slower allocations, what will be.

    glibc keeps it otherwise, and it counts as resident.
    """
    gc.collect()
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
        library.mallopt(_M_MMAP_THRESHOLD, 1 << 16)


def _resident(line: str) -> int:
    """Bytes of this process, as the kernel tells; 0 where it has no such file."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(text.split()[1]) << 10 for text in lines if text.startswith(f"{line}:")), 0)
