"""What a run takes of disk and accelerator memory at the very least, from the teacher's files and the settings.

Lower bounds, so that what is refused could not have gone well: activations, text encoders and embeddings come on top.
``estimates`` has the whole of a target set; it takes torch.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from teefusion.settings import Settings
from teefusion.teacher_files import TeacherFiles

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_FLUX_SIDE = 128  # FLUX transformers have no size in their config; diffusers' pipeline has this one


@dataclass(frozen=True)
class Footprint:
    """Bytes, at least."""

    targets_disk: int
    """States of the target set."""
    training_disk: int
    """Checkpoints and student."""
    targets_memory: int
    """On each accelerator that makes targets: the teacher's transformers."""
    training_memory: int
    """On each accelerator that trains: weights, gradients, the optimizer's states, averages."""


def footprint(settings: Settings, teacher: TeacherFiles) -> Footprint:
    """Of the whole run."""
    train, targets, count = settings.train, settings.targets, teacher.parameters
    states = (targets.trajectories + targets.heldout_trajectories) * targets.states_per_trajectory
    adam = 2 if train.optimizer == "adamw_8bit" else 8
    averaged = 4 if train.ema_decay else 0
    checkpoint = 4 + adam + averaged
    transformers = 1 if settings.strategy.second is None else 2
    return Footprint(
        targets_disk=states * 2 * _latent_values(settings, teacher) * _BYTES[targets.dtype],
        training_disk=count * (checkpoint * train.keep_checkpoints + 4),
        targets_memory=count * _BYTES[settings.teacher.dtype] * transformers,
        training_memory=round(count * _training_bytes(settings, adam, averaged)),
    )


def _training_bytes(settings: Settings, adam: int, averaged: int) -> float:
    """Bytes a parameter on each rank: what a ZeRO stage shares is divided, what is offloaded is left out."""
    train, cluster = settings.train, settings.cluster
    ranks = train.num_processes
    if cluster.takes_trainjob("train"):
        ranks = cluster.nodes * cluster.processes_per_node
    if train.zero_stage == 0:
        return 4 + 4 + adam + averaged
    passes = _BYTES[train.precision]
    masters = (4 if passes == 2 else 0) + adam
    shared = averaged / ranks + (0 if train.offload else masters / ranks)
    gradients = passes / (ranks if train.zero_stage >= 2 else 1)
    weights = 0 if train.zero_stage == 3 and train.offload else passes / (ranks if train.zero_stage == 3 else 1)
    return shared + gradients + weights


def _latent_values(settings: Settings, teacher: TeacherFiles) -> int:
    """Numbers in the latents of one picture. FLUX's come in patches of 2 x 2, which its channels count."""
    packed = teacher.transformer == "FluxTransformer2DModel"
    channels = int(teacher.config["in_channels"]) // (4 if packed else 1)
    side = int(teacher.config.get("sample_size", _FLUX_SIDE))
    sides = (settings.teacher.height, settings.teacher.width)
    height, width = (pixels // teacher.vae_scale_factor if pixels else side for pixels in sides)
    return channels * height * width


def free_bytes(folder: Path) -> int:
    """On the disk that a folder, made or not, lies on."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    return shutil.disk_usage(there).free


def folder_bytes(folder: Path) -> int:
    """Of all files below a folder, made or not."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # gone since it was listed
            total += path.stat().st_size
    return total


def device_bytes(settings: Settings) -> int | None:
    """Memory of one accelerator: as set, or as the driver of this machine says; none where nobody knows."""
    if settings.cluster.accelerator_memory_gb:
        return round(settings.cluster.accelerator_memory_gb * 2**30)
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout
        return min(int(line) for line in told.split()) * 2**20
    return None
