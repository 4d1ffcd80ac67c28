"""Forwards a second of a published teacher's shape with random weights; ``targets.py --architecture`` runs it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

from measuring import ForwardClock, rate_text, spread, timed


class RandomTeacher:
    """A published teacher's transformer with random weights, and random embeddings for text."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch
        from diffusers import FlowMatchEulerDiscreteScheduler

        from teefusion.architectures import architecture, teacher_shape
        from teefusion.devices import resolve_device
        from teefusion.settings import load_settings
        from teefusion.strategies import make_strategy
        from teefusion.teachers import Teacher

        self.settings = load_settings(
            overrides={
                "teacher.name": options.architecture,
                "strategy.name": options.strategy,
                "strategy.num_steps": options.steps,
                "targets.states_per_trajectory": 1,
            }
        )
        torch.manual_seed(0)
        device = resolve_device(options.device)
        self.shape, self.dtype = teacher_shape(self.settings.teacher), getattr(torch, self.settings.teacher.dtype)
        found = architecture(self.settings.teacher)
        outline = found.outline(device=device, dtype=self.dtype)
        # Sampling costs the same at any shift; 3 is that of SD3's published scheduler.
        outline = dataclasses.replace(outline, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0))
        self.teacher = Teacher(outline, found.family, self.settings.teacher, device)
        self.strategy, self.grid = make_strategy(self.settings.strategy), self.teacher.grid(options.steps)

    def compiled(self) -> None:
        """From now on the transformer is a compiled one."""
        import torch

        outline = self.teacher.pipeline
        faster = dataclasses.replace(outline, transformer=torch.compile(outline.transformer))
        self.teacher = dataclasses.replace(self.teacher, pipeline=faster)

    def text(self, count: int) -> Any:
        """Embeddings of ``count`` prompts that nobody wrote."""
        import torch

        from teefusion.families import TextEmbeddings

        shape, options = self.shape, {"device": self.teacher.device, "dtype": self.dtype}
        return TextEmbeddings(
            torch.randn(count, shape.text_tokens, shape.text_width, **options),
            torch.randn(count, shape.pooled_width, **options),
        )

    def sampler(self, batch: int) -> Callable[[], dict[str, Any]]:
        """Walks one batch of trajectories when called."""
        from teefusion.prompts import Prompt
        from teefusion.targets import draw, walk

        shape = self.teacher.latent_shape
        draws = [draw(self.settings, "train", j, Prompt(f"prompt {j}"), shape) for j in range(batch)]
        text, null = self.text(batch), self.text(1)
        return lambda: walk(self.teacher, self.strategy, self.grid, text, null, draws)


def measure_shape(options: argparse.Namespace) -> dict[str, Any]:
    """Forwards a second, share of the device's peak and memory for each batch size: plain, and compiled if asked."""
    bench = RandomTeacher(options)
    device, name, peak = bench.teacher.device, *_device_and_peak(options, bench.teacher.device)
    modes = {}
    for mode in ("plain", "compiled") if options.compile else ("plain",):
        if mode == "compiled":
            bench.compiled()
        modes[mode] = {batch: _measure_batch(bench, batch, options.rounds, peak, mode) for batch in options.batches}
    return {
        "architecture": options.architecture,
        "strategy": options.strategy,
        "num_steps": options.steps,
        "device": name if device.startswith("cuda") else device,
        "dtype": bench.settings.teacher.dtype,
        "pixels": bench.shape.pixels,
        "parameters": bench.shape.parameters,
        "forward_flops": bench.shape.forward_flops,
        "peak_flops": peak,
        "rounds": options.rounds,
        "modes": modes,
    }


def _measure_batch(bench: RandomTeacher, batch: int, rounds: int, peak: float | None, mode: str) -> dict[str, Any]:
    import torch

    device, on_gpu = bench.teacher.device, bench.teacher.device.startswith("cuda")
    forwards = batch * bench.strategy.forwards(len(bench.grid))
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    try:
        sample = bench.sampler(batch)
        first = timed(sample, device)  # pays for allocation and compilation
        rates = spread([forwards / timed(sample, device) for _ in range(rounds)])
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    share = None
    if mode == "plain":  # inside a compiled module hooks would split what is compiled
        with ForwardClock().on(bench.teacher.pipeline.transformer, device) as clock:
            seconds = timed(sample, device)
        share = clock.seconds / seconds
    return {
        "forwards_a_second": rates,
        "utilisation": rates["median"] * bench.shape.forward_flops / peak if peak else None,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
        "transformer_share": share,
        "first_walk_s": first,
    }


def _device_and_peak(options: argparse.Namespace, device: str) -> tuple[str, float | None]:
    """The device's name, and its peak in FLOP/s where it is known or given."""
    import torch

    from teefusion.estimates import device_reported_as, find_device

    if options.peak:
        given = find_device(options.peak)
        return given.name, given.peak_flops
    if not device.startswith("cuda"):
        return device, None
    name = torch.cuda.get_device_name(device)
    known = device_reported_as(name)
    return name, known.peak_flops if known else None


def shape_text(result: dict[str, Any]) -> str:
    """For people."""
    lines = [
        f"{result['architecture']}, {result['parameters']:,} random {result['dtype']} parameters, "
        f"{' x '.join(map(str, result['pixels']))} pixels, {result['strategy']}, on {result['device']}; "
        f"{result['forward_flops']:.3g} FLOPs a forward; medians of {result['rounds']} rounds (least to greatest)"
    ]
    for mode, batches in result["modes"].items():
        for batch, values in batches.items():
            if "error" in values:
                lines.append(f"{mode:9s} batch {batch!s:3s} {values['error']}")
                continue
            used, memory, share = (values[key] for key in ("utilisation", "peak_memory_bytes", "transformer_share"))
            parts = [f"{rate_text(values['forwards_a_second'])} forwards/s"]
            parts.append("peak of this device unknown: give --peak" if used is None else f"{used:.1%} of the peak")
            parts += [f"{memory / 1e9:.1f} GB"] if memory is not None else []
            parts += [f"{share:.1%} of the time in the transformer"] if share is not None else []
            lines.append(f"{mode:9s} batch {batch!s:3s} " + ", ".join(parts))
    return "\n".join(lines)
