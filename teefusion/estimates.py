"""What a target set will take, before anything is spent: forwards, FLOPs, GPU hours, bytes, files.

Forwards, FLOPs and bytes are counted, from the settings and the teacher's shape. GPU hours are those FLOPs over a share
of the device's peak, and that share is an assumption until ``benchmarks/targets.py`` has measured it. Text encoders
and VAE are left out: they work once a prompt or a picture, the transformer works in every step.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from teefusion.architectures import TeacherShape, teacher_shape
from teefusion.errors import SettingsError
from teefusion.files import readable_bytes
from teefusion.settings import Settings
from teefusion.strategies import make_strategy

ASSUMED_UTILISATION = 0.4
"""Share of the peak that forwards reach, where none is given. A round guess, not a measurement."""


@dataclass(frozen=True)
class Device:
    """A GPU as its data sheet has it."""

    name: str
    peak_flops: float
    """FLOP/s of bfloat16 matrix products, dense."""
    memory_bytes: int | None = None
    """None where unknown."""
    reported_as: tuple[str, ...] = ()
    """Its names in the driver."""


# NVIDIA's data sheets. Where they print rates with sparsity, which is twice the dense one, half is taken: H200 and
# H100 SXM 1979, L40S 733 (printed beside 362 dense). A100 80 GB: 312. RTX 4090, Ada architecture paper, with float32
# accumulation: 165. Memory in the sheets' gigabytes, of 1e9 bytes.
DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("H200", 989e12, 141 * 10**9, ("NVIDIA H200",)),
        Device("H100-SXM", 989e12, 80 * 10**9, ("NVIDIA H100 80GB HBM3",)),
        Device("A100", 312e12, 80 * 10**9, ("NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe")),
        Device("L40S", 362e12, 48 * 10**9, ("NVIDIA L40S",)),
        Device("RTX-4090", 165e12, 24 * 10**9, ("NVIDIA GeForce RTX 4090",)),
    )
}


@dataclass(frozen=True)
class Estimate:
    """What a target set will take; both splits together where nothing else is said."""

    teacher: str
    dtype: str
    parameters: int
    weights_bytes: int
    pixels: tuple[int, int]
    """Height, width."""
    strategy: str
    num_steps: int
    forwards_a_trajectory: float
    """Whole, but for sets of noised pictures, where it is an expectation: only the kept steps are computed."""
    trajectories: int
    heldout_trajectories: int
    """Of those."""
    forwards: int
    forward_flops: int
    flops: int
    device: str
    peak_flops: float
    memory_bytes: int | None
    utilisation: float
    utilisation_assumed: bool
    """Whether nobody said what share of the peak is reached."""
    gpu_hours: float
    states: int
    states_bytes: int
    prompts: int
    """Distinct ones, whose embeddings are stored; the empty one is not among them."""
    text_tokens: int
    embeddings_bytes: int
    files: int
    """Of tensors. Beside each lies a record, and one manifest beside them all."""
    bytes: int
    """Of those files."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


def estimate_targets(
    settings: Settings,
    device: str,
    *,
    utilisation: float | None = None,
    prompts: tuple[int, int] | None = None,
    shape: TeacherShape | None = None,
) -> Estimate:
    """What the target set of ``settings`` will take on one ``device``, a name in DEVICES or ``name:TFLOPS``.

    ``utilisation`` is the share of the device's peak that forwards reach, in (0, 1]. ``prompts`` are how many distinct
    ones the train and held-out splits have; none is one a trajectory, the most that embeddings can take. ``shape`` is
    ``teacher_shape(settings.teacher)``, for callers that estimate one teacher many times.

    Raises SettingsError for an unknown device or an impossible utilisation, TeacherError for an unreadable teacher.
    """
    spec, share = find_device(device), ASSUMED_UTILISATION if utilisation is None else utilisation
    if not 0 < share <= 1:
        raise SettingsError(f"utilisation is {share:g}: the share of the peak that is reached lies in (0, 1].")
    shape = shape or teacher_shape(settings.teacher)
    splits = (settings.targets.trajectories, settings.targets.heldout_trajectories)
    used = (min(prompts[0], splits[0]), min(prompts[1], splits[1])) if prompts else splits
    a_trajectory = _forwards_a_trajectory(settings)
    forwards = round(sum(splits) * a_trajectory)
    states, embeddings = _stored(settings, shape, splits, used)
    return Estimate(
        teacher=settings.teacher.name,
        dtype=settings.teacher.dtype,
        parameters=shape.parameters,
        weights_bytes=shape.weights_bytes * (1 if settings.strategy.second is None else 2),
        pixels=shape.pixels,
        strategy=settings.strategy.name,
        num_steps=settings.strategy.num_steps,
        forwards_a_trajectory=a_trajectory,
        trajectories=sum(splits),
        heldout_trajectories=splits[1],
        forwards=forwards,
        forward_flops=shape.forward_flops,
        flops=forwards * shape.forward_flops,
        device=spec.name,
        peak_flops=spec.peak_flops,
        memory_bytes=spec.memory_bytes,
        utilisation=share,
        utilisation_assumed=utilisation is None,
        gpu_hours=forwards * shape.forward_flops / (spec.peak_flops * share) / 3600,
        states=sum(splits) * settings.targets.states_per_trajectory,
        states_bytes=states.bytes,
        prompts=sum(used),
        text_tokens=shape.text_tokens,
        embeddings_bytes=embeddings.bytes,
        files=states.files + embeddings.files,
        bytes=states.bytes + embeddings.bytes,
    )


def find_device(name: str) -> Device:
    """The device of that name in DEVICES, in any case; ``name:TFLOPS`` is one that is not there.

    Raises SettingsError.
    """
    known = {key.lower(): device for key, device in DEVICES.items()}
    if name.lower() in known:
        return known[name.lower()]
    label, _, peak = name.rpartition(":")
    try:
        tflops = float(peak) if label else math.nan
    except ValueError:
        tflops = math.nan
    if not 0 < tflops < math.inf:
        raise SettingsError(
            f"The peak of device {name!r} is not known. Known: {', '.join(DEVICES)}. For another give its dense "
            "bfloat16 peak in TFLOP/s, as in mycard:500."
        )
    return Device(label, tflops * 1e12)


def device_reported_as(driver_name: str) -> Device | None:
    """The device that the driver calls so (``torch.cuda.get_device_name``), or none."""
    return next((device for device in DEVICES.values() if driver_name in device.reported_as), None)


def text(estimate: Estimate) -> str:
    """The estimate as a table for people; what is assumed says so."""
    e = estimate
    guess = "assumed; benchmarks/targets.py measures it" if e.utilisation_assumed else "as given"
    memory = f" of the device's {readable_bytes(e.memory_bytes)}" if e.memory_bytes else ""
    crowded = "; they do not fit" if e.memory_bytes and e.weights_bytes > e.memory_bytes else ""
    slow = "" if e.dtype != "float32" else "; float32 forwards are slower than that"
    rows = {
        "teacher": f"{e.teacher}, {e.parameters:,} parameters, {e.dtype}, {e.pixels[0]} x {e.pixels[1]} pixels",
        "strategy": f"{e.strategy}, {e.num_steps} steps, {e.forwards_a_trajectory:g} forwards a trajectory",
        "trajectories": f"{e.trajectories:,}, of them {e.heldout_trajectories:,} held out",
        "forwards": f"{e.forwards:,} of the transformer; text encoders and VAE are left out",
        "FLOPs": f"{e.flops:.3g}, {e.forward_flops:.3g} a forward",
        "device": f"{e.device}, peak {e.peak_flops / 1e12:g} TFLOP/s (bfloat16, dense{slow})",
        "utilisation": f"{e.utilisation:.0%} of the peak ({guess})",
        "GPU hours": f"{e.gpu_hours:,.3g}" if e.gpu_hours < 1000 else f"{e.gpu_hours:,.0f}",
        "weights": f"{readable_bytes(e.weights_bytes)}{memory}{crowded}",
        "states": f"{e.states:,}, {readable_bytes(e.states_bytes)}",
        "embeddings": f"{e.prompts:,} prompts of {e.text_tokens} tokens, {readable_bytes(e.embeddings_bytes)}",
        "files": f"{e.files:,}, {readable_bytes(e.bytes)}",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}s}  {value}" for name, value in rows.items())


def _forwards_a_trajectory(settings: Settings) -> float:
    """Transformer forwards, on average where the steps that are computed are drawn."""
    steps = settings.strategy.num_steps
    whole = make_strategy(settings.strategy).forwards(steps)
    return float(whole if settings.targets.images is None else whole * settings.targets.states_per_trajectory / steps)


Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Types and shapes of a file's tensors, by name."""


class _Stored(NamedTuple):
    bytes: int
    files: int


def _stored(
    settings: Settings, shape: TeacherShape, trajectories: tuple[int, int], prompts: tuple[int, int]
) -> tuple[_Stored, _Stored]:
    """States and embeddings of both splits, as ``teefusion.shards`` stores them; the empty prompt's are embeddings."""
    states = _blocks(trajectories, settings.targets.shard_trajectories, lambda n: _state_shard(settings, shape, n))
    block = settings.targets.shard_trajectories
    embeddings = _blocks(prompts, block, lambda n: _embedding_block(settings, shape, n))
    null = file_bytes(_embedding_block(settings, shape, 1))
    return states, _Stored(embeddings.bytes + null, embeddings.files + 1)


def _blocks(splits: tuple[int, int], block: int, tensors_of: Callable[[int], Tensors]) -> _Stored:
    """Files that hold ``block`` each, and the last of a split what is left."""
    sizes = [(block, split // block) for split in splits] + [(split % block, 1) for split in splits if split % block]
    files = sum(number for _, number in sizes)
    return _Stored(sum(number * file_bytes(tensors_of(size)) for size, number in sizes if number), files)


def _state_shard(settings: Settings, shape: TeacherShape, trajectories: int) -> Tensors:
    rows = trajectories * settings.targets.states_per_trajectory
    dtype = getattr(torch, settings.targets.dtype)
    return {
        "x": (dtype, (rows, *shape.latent_shape)),
        "velocity": (dtype, (rows, *shape.latent_shape)),
        "sigma": (torch.float32, (rows,)),
        "step": (torch.int32, (rows,)),
        "guidance": (torch.float32, (rows,)),
        "guidance_gap": (torch.float32, (rows,)),
        "trajectory": (torch.int64, (rows,)),
        "prompt": (torch.int64, (rows,)),
    }


def _embedding_block(settings: Settings, shape: TeacherShape, prompts: int) -> Tensors:
    dtype = getattr(torch, settings.teacher.dtype)  # as the text encoders give them
    return {
        "tokens": (dtype, (prompts, shape.text_tokens, shape.text_width)),
        "pooled": (dtype, (prompts, shape.pooled_width)),
    }


def file_bytes(tensors: Tensors) -> int:
    """Bytes of a safetensors file: a length, a JSON header padded to eight bytes, the tensors one after another."""
    header, offset = {}, 0
    for name, (dtype, dims) in tensors.items():
        end = offset + math.prod(dims) * dtype.itemsize
        header[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": dims, "data_offsets": (offset, end)}
        offset = end
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // 8) * 8 + offset


_SAFETENSORS_NAMES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.int64: "I64",
}
