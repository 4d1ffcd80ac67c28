"""Memory of training, a rank: predicted from shapes alone before anything is bought, and told beside what was measured.

Weights, gradients, optimizer and averages are counted; what a forward and backward hold beside them is found by running
both on tensors without data (torch's FakeTensorMode), and following which of them live.

Not in here: the CUDA context and libraries (about 1 GB a GPU), what the allocator cannot use, and on a CPU the stored
states that are read ahead (train.shuffle_mb).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import is_deepspeed_available
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from teefusion.architectures import Outline, architecture, teacher_shape
from teefusion.devices import plain_attention
from teefusion.estimates import find_device
from teefusion.files import readable_bytes
from teefusion.lora import make_trainable
from teefusion.settings import Settings

STAGES = (0, 1, 2, 3)
BUCKET_ELEMENTS = 500_000_000
"""Gradients that DeepSpeed gathers before it sends them, at most; its default."""
GATHERED_ELEMENTS = 1_000_000_000
"""Weights that it keeps whole in a pass of stage 3, at most; its default."""


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank at one ZeRO stage."""

    zero_stage: int
    weights: int
    """Of the passes; above stage 0 also this rank's float32 ones."""
    gradients: int
    """Whole or in part, and the buffers in which they travel."""
    optimizer: int
    average: int
    activations: int
    """Most that forward and backward hold beside these."""
    peak: int
    """Less than the sum where gradients come as activations go."""


def estimate_memory(settings: Settings, *, cpu: bool = False) -> dict[str, Any]:
    """Memory of training with these settings at every ZeRO stage; JSON-ready.

    ``cpu`` is for a run on a CPU, where attention is not fused. Raises TeacherError, and TrainingError without peft
    where a LoRA is asked for.
    """
    ranks, micro = world_size(settings), _micro_batch(settings)
    # ZeRO's passes are in bfloat16 throughout; plain ones are autocast from float32 weights.
    plain = _passes(settings, micro, cpu=cpu, cast=False)
    cast = plain if settings.train.precision == "float32" else _passes(settings, micro, cpu=cpu, cast=True)
    stages = [_stage(settings, stage, ranks, cast if stage else plain) for stage in STAGES]
    return {
        "teacher": settings.teacher.name,
        "parameters": plain.parameters,
        "trained_parameters": plain.trained,
        "ranks": ranks,
        "states_a_pass": micro,
        "precision": settings.train.precision,
        "stages": [dataclasses.asdict(stage) for stage in stages],
    }


def world_size(settings: Settings) -> int:
    """Ranks that train, on all nodes."""
    cluster = settings.cluster
    if cluster.takes_trainjob("train"):
        return cluster.nodes * cluster.processes_per_node
    return settings.train.num_processes


def _micro_batch(settings: Settings) -> int:
    """States of one pass of one rank."""
    return settings.train.batch_size // (world_size(settings) * settings.train.gradient_accumulation_steps)


def memory_text(estimate: Mapping[str, Any], device: str) -> str:
    """The estimate as a table for people, beside the device's."""
    room = find_device(device).memory_bytes
    columns = [field.name for field in dataclasses.fields(StageMemory)]
    rows = [["ZeRO stage", *columns[1:], f"on {device}"]]
    for stage in estimate["stages"]:
        verdict = "?" if room is None else f"{stage['peak'] / room:.0%}"
        rows.append([str(stage["zero_stage"]), *(readable_bytes(stage[name]) for name in columns[1:]), verdict])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return (
        f"{estimate['teacher']}: {estimate['parameters']:,} parameters, {estimate['trained_parameters']:,} of them "
        f"trained, {estimate['ranks']} ranks, {estimate['states_a_pass']} states a pass, {estimate['precision']}. "
        f"Memory of each rank:\n{table}"
    )


@dataclass(frozen=True)
class _Passes:
    """What forward and backward of one micro-batch hold, in bytes."""

    parameters: int
    trained: int
    compute: int
    """Bytes of a weight in the passes."""
    activations: int
    """Most, without gradients of weights."""
    with_gradients: int
    """Most, with them."""


def _passes(settings: Settings, micro: int, *, cpu: bool, cast: bool) -> _Passes:
    """Run forward and backward on tensors without data; ``cast`` has the weights themselves in bfloat16."""
    outline, model = _outline(settings, cast=cast)
    with FakeTensorMode(), plain_attention() if cpu else contextlib.nullcontext():
        loss = _make_loss(settings, outline, model, micro)
        with _Live(model) as live:
            loss().backward()
    weights = list(model.parameters())
    return _Passes(
        parameters=sum(weight.numel() for weight in weights),
        trained=sum(weight.numel() for weight in weights if weight.requires_grad),
        compute=weights[0].dtype.itemsize,
        activations=live.peak_without_gradients,
        with_gradients=live.peak,
    )


def rehearse(settings: Settings) -> None:
    """Run forward and backward of one micro-batch on this CPU, of weights without meaning, and let all of it go.

    A process's first passes compile a kernel for every shape and keep it, 30 MB for a small transformer and little more
    for a large one; Accelerate imports DeepSpeed wherever it is installed, 60 MB; ZeRO when it begins imports torch's
    compiler, 40 MB. As a GPU's context these are no memory of training: who measures that does this before. Raises
    TeacherError.
    """
    if is_deepspeed_available():
        importlib.import_module("deepspeed")
    if settings.train.zero_stage or settings.train.compile:
        torch.compile(torch.square)  # compiles nothing yet, but imports what does
    outline, model = _outline(settings, cast=settings.train.zero_stage > 0 and settings.train.precision == "bfloat16")
    with plain_attention():
        _make_loss(settings, outline, model, _micro_batch(settings))().backward()


def _outline(settings: Settings, *, cast: bool) -> tuple[Outline, Any]:
    """The teacher's, and the student of its transformer, in bfloat16 or float32 and without memory yet."""
    outline = architecture(settings.teacher).outline(dtype=torch.bfloat16 if cast else torch.float32)
    return outline, make_trainable(outline.transformer, settings.train.lora_rank).train()


def _make_loss(settings: Settings, outline: Outline, model: Any, micro: int) -> Callable[[], Tensor]:
    """Allocate weights, as the tensor mode has it and never filled, and ``micro`` states; gives what runs forward."""
    options, family = settings.train, architecture(settings.teacher).family
    dtype = next(model.parameters()).dtype
    _allocate(model)
    if options.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    latents = family.latent_shape(outline, settings.teacher.height, settings.teacher.width)
    tokens = family.text_tokens(outline, settings.teacher.max_sequence_length)
    width, pooled = (int(outline.transformer.config[name]) for name in ("joint_attention_dim", "pooled_projection_dim"))
    x_BCHW, sigma_B = torch.empty(micro, *latents), torch.empty(micro)
    text = torch.empty(micro, tokens, width, dtype=dtype), torch.empty(micro, pooled, dtype=dtype)
    autocast = options.precision == "bfloat16" and dtype == torch.float32

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return family.velocity(model, x_BCHW, sigma_B, *text).float().square().mean()

    return loss


def _allocate(model: nn.Module) -> None:
    """Put tensors of the CPU in place of the meta device's; fake ones too, which the model's ``to`` cannot."""
    for module in model.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                empty = torch.empty(weight.shape, dtype=weight.dtype)
                module._parameters[name] = nn.Parameter(empty, requires_grad=weight.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


class _Live(TorchDispatchMode):
    """Follows the bytes of the tensors that operations make, until they are freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.peak_without_gradients = 0
        self._bytes = self._gradients = 0
        self._known = {id(tensor.untyped_storage()) for tensor in (*model.parameters(), *model.buffers())}
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_post_accumulate_grad_hook(self._count_gradient)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._follow(tensor.untyped_storage())
        self.peak = max(self.peak, self._bytes)
        self.peak_without_gradients = max(self.peak_without_gradients, self._bytes - self._gradients)
        return result

    def _follow(self, storage: Any) -> None:
        if id(storage) in self._known:
            return
        self._known.add(id(storage))
        self._bytes += storage.nbytes()
        weakref.finalize(storage, self._freed, id(storage), storage.nbytes())

    def _freed(self, identity: int, count: int) -> None:
        self._known.discard(identity)
        self._bytes -= count

    def _count_gradient(self, weight: Tensor) -> None:
        assert weight.grad is not None, "the hook comes after the gradient"
        self._gradients += weight.grad.nbytes


def _stage(settings: Settings, stage: int, ranks: int, passes: _Passes) -> StageMemory:
    """Count what is kept, and find the peak: in backward, or in the optimizer's step."""
    weights, trained, compute = passes.parameters * passes.compute, passes.trained, passes.compute
    average = 4 * trained if settings.train.ema_decay else 0
    states = (2 if settings.train.optimizer == "adamw_8bit" else 8) * trained
    if stage == 0:
        gradients = 4 * trained
        # Of several ranks DDP's buckets are the gradients, and are there all the time.
        most = max(passes.with_gradients, gradients) if ranks == 1 else gradients + passes.activations
        peak = weights + states + average + most
        return StageMemory(stage, weights, gradients, states, average, passes.activations, peak)
    part = -(-trained // ranks)
    masters, states, average = 4 * part, 8 * part, 4 * part if settings.train.ema_decay else 0
    held = compute * (trained if stage == 1 else part)
    bucket = compute * min(BUCKET_ELEMENTS, trained)
    gathered = compute * min(GATHERED_ELEMENTS, passes.parameters) if stage == 3 else 0
    if stage == 3:
        weights = -(-weights // ranks)
    if settings.train.offload:
        masters = states = average = 0
    kept = weights + masters + states + average
    # At stage 3 a bucket is copied once more to be scattered, and its parts come back as tensors of their own.
    gradients = held + bucket + (bucket + bucket // ranks if stage == 3 else 0)
    step = held + (0 if settings.train.offload else 4 * part)  # the optimizer's own, in float32
    peak = kept + max(passes.activations + gathered + gradients, step)
    return StageMemory(stage, weights + masters, gradients, states, average, passes.activations, peak)


def describe_trial(settings: Settings, *, cpu: bool, measured_bytes: int, step_seconds: float) -> dict[str, Any]:
    """What a dry run of a few steps says of the whole run; JSON-ready."""
    estimate = estimate_memory(settings, cpu=cpu)
    stage, options = estimate["stages"][settings.train.zero_stage], settings.train
    shape = teacher_shape(settings.teacher)
    tokens = (
        shape.text_tokens + shape.latent_shape[1] * shape.latent_shape[2] // 4
    )  # both families: one of 2 x 2 latents
    trained, parameters = estimate["trained_parameters"], estimate["parameters"]
    checkpoint = trained * (12 + (4 if options.ema_decay else 0))
    return {
        **{key: estimate[key] for key in ("teacher", "parameters", "trained_parameters", "ranks", "precision")},
        "zero_stage": options.zero_stage,
        "batch_size": options.batch_size,
        "estimated_bytes": stage["peak"],
        "measured_bytes": measured_bytes,
        "step_seconds": step_seconds,
        "forwards_per_second": options.batch_size / step_seconds,
        "tokens_per_second": options.batch_size * tokens / step_seconds,
        "hours": step_seconds * options.steps / 3600,
        "checkpoint_bytes": checkpoint,
        "stored_bytes": checkpoint * (options.keep_checkpoints + 1) + 4 * parameters,
    }


def trial_text(trial: Mapping[str, Any]) -> str:
    """What ``describe_trial`` gives, for people."""
    rows = {
        "student": f"{trial['parameters']:,} parameters, {trial['trained_parameters']:,} trained, {trial['precision']}",
        "ranks": f"{trial['ranks']}, ZeRO stage {trial['zero_stage']}, {trial['batch_size']} states a step",
        "memory a rank": f"{readable_bytes(trial['measured_bytes'])} measured, "
        f"{readable_bytes(trial['estimated_bytes'])} estimated",
        "step": f"{trial['step_seconds']:.3g} s: {trial['forwards_per_second']:,.3g} forwards a second, "
        f"{trial['tokens_per_second']:,.4g} tokens a second",
        "whole run": f"{trial['hours']:,.3g} h, without measurements and checkpoints",
        "stored": f"{readable_bytes(trial['stored_bytes'])} at most, {readable_bytes(trial['checkpoint_bytes'])} a "
        "checkpoint",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}s}  {value}" for name, value in rows.items())
