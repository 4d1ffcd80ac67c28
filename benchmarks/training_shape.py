"""What a training step takes on one device, by a published shape with random weights: no checkpoint is needed.

    python benchmarks/training_shape.py [--architecture sd3-medium] [--device cuda] [--batch-size 8] [--json]

Model FLOP utilisation, peak memory beside the estimate, and the time of a step in its parts.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from measuring import Clock, setting, spread, synchronize, timed
from torch.utils.flop_counter import FlopCounterMode

from teefusion.architectures import architecture
from teefusion.devices import resolve_device
from teefusion.distillation import distillation_loss
from teefusion.engine import Engine
from teefusion.estimates import device_reported_as, find_device
from teefusion.families import TextEmbeddings
from teefusion.fusion import fuse, make_fusion, pack
from teefusion.settings import load_settings
from teefusion.stream import States
from teefusion.training_memory import estimate_memory


class RandomStudent:
    """A student of an architecture, with random weights, states and text."""

    def __init__(self, found: Any, settings: Any, device: str) -> None:
        torch.manual_seed(0)
        self.settings, self.family, batch = settings, found.family, settings.train.batch_size
        outline = found.outline(device="cpu")
        latents = self.family.latent_shape(outline, settings.teacher.height, settings.teacher.width)
        tokens = self.family.text_tokens(outline, settings.teacher.max_sequence_length)
        width, pooled = (int(outline.transformer.config[n]) for n in ("joint_attention_dim", "pooled_projection_dim"))
        self.engine = Engine(settings.train, cpu=device == "cpu")
        self.engine.prepare(fuse(outline.transformer, make_fusion("affine")).train().requires_grad_(True))
        self.parameters = sum(weight.numel() for weight in self.engine.unwrapped.parameters())
        text = TextEmbeddings(torch.randn(batch, tokens, width).bfloat16(), torch.randn(batch, pooled).bfloat16())
        x_BCHW, velocity_BCHW = torch.randn(2, batch, *latents).half()
        ones = torch.ones(batch)
        self.null_P = torch.zeros(pooled, device=self.engine.device)
        self.states = States(x_BCHW, velocity_BCHW, ones * 0.5, ones * 4, ones, text, ones.long(), ones.long())

    def loss(self, states: Any) -> Any:
        """As in training."""
        packed = pack(states.text.pooled_BP, self.null_P, states.guidance_B)
        tokens = states.text.tokens_BTE.to(self.engine.input_dtype)
        predicted = self.family.velocity(self.engine.model, states.x_BCHW, states.sigma_B * 1000.0, tokens, packed)
        return distillation_loss(predicted, states.velocity_BCHW, states.gap_B, weighting="none", scale=1.0)

    def step(self) -> None:
        """One optimizer step, data and all."""
        states = self.states.to(self.engine.device)
        self.engine.step([lambda: self.loss(states)])

    def forward_flops(self) -> int:
        """Of the batch: two for each multiply-add of matrix products."""
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            self.loss(self.states.to(self.engine.device))
        return counter.get_total_flops()

    def parts(self) -> dict[str, float]:
        """Seconds of a step in its parts, each waited for, which makes the whole a little slower."""
        times: dict[str, float] = {}
        started = time.perf_counter()
        states = self.states.to(self.engine.device)
        synchronize(self.engine.device)
        times["data"] = time.perf_counter() - started
        accelerator, optimizer = self.engine.accelerator, self.engine.optimizer
        with (
            self._timed(accelerator, "backward", times),
            self._timed(optimizer, "step", times, name="optimizer"),
            self._timed(self, "loss", times, name="forward"),
        ):
            self.engine.step([lambda: self.loss(states)])
            synchronize(self.engine.device)
        times["other"] = time.perf_counter() - started - sum(times.values())  # clipping, average, checks
        return times

    @contextlib.contextmanager
    def _timed(self, owner: Any, method: str, times: dict[str, float], *, name: str | None = None) -> Iterator[None]:
        inner, device = getattr(owner, method), self.engine.device

        def outer(*arguments: Any, **options: Any) -> Any:
            synchronize(device)
            started = time.perf_counter()
            result = inner(*arguments, **options)
            synchronize(device)
            times[name or method] = time.perf_counter() - started
            return result

        setattr(owner, method, outer)
        try:
            yield
        finally:
            setattr(owner, method, inner)


def seconds_of(student: RandomStudent, rounds: int, clock: Clock = time.perf_counter) -> dict[str, float]:
    """Of steps, after one that pays for allocation and compilation."""
    student.step()
    return spread([timed(student.step, student.engine.device, clock) for _ in range(rounds)])


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Utilisation, memory and the parts of a step on one device."""
    device = resolve_device(options.device)
    values = {"teacher.name": options.architecture, "train.batch_size": options.batch_size}
    values |= {"train.precision": "bfloat16", "train.compile": options.compile}
    settings = load_settings(overrides=values | dict(options.set))
    student = RandomStudent(architecture(settings.teacher), settings, device)
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else device
    known = find_device(options.peak) if options.peak else device_reported_as(name)
    flops = 3 * student.forward_flops()  # the backward pass makes two products for each of the forward's
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    seconds = seconds_of(student, options.rounds)
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
    estimate = estimate_memory(settings, cpu=not on_gpu)
    parts = [student.parts() for _ in range(options.rounds)]
    return {
        "architecture": options.architecture,
        "device": name,
        "parameters": student.parameters,
        "batch_size": options.batch_size,
        "settings": settings.train.model_dump(),
        "step_seconds": seconds,
        "step_flops": flops,
        "mfu": flops / seconds["median"] / known.peak_flops if known else None,
        "peak_memory_bytes": memory,
        "estimated_memory_bytes": estimate["stages"][settings.train.zero_stage]["peak"],
        "parts_seconds": {key: statistics.median(part[key] for part in parts) for key in parts[0]},
        "rounds": options.rounds,
    }


def text(result: dict[str, Any]) -> str:
    """For people."""
    seconds, used, memory = (result[key] for key in ("step_seconds", "mfu", "peak_memory_bytes"))
    measured = f"{memory / 1e9:.1f} GB" if memory is not None else "not measured on a CPU"
    shown = f"{seconds['median']:.4g} s a step ({seconds['least']:.4g} to {seconds['greatest']:.4g})"
    lines = [
        f"{result['architecture']}, {result['parameters']:,} random parameters, {result['batch_size']} states a step, "
        f"on {result['device']}; medians of {result['rounds']} rounds (least to greatest)",
        f"{shown}; model FLOP utilisation " + (f"{used:.1%}" if used else "unknown: give --peak NAME:TFLOPS"),
        f"peak memory {measured}, estimated {result['estimated_memory_bytes'] / 1e9:.1f} GB",
    ]
    whole = sum(result["parts_seconds"].values())
    lines += [f"{part:10s} {value:8.4f} s {value / whole:6.1%}" for part, value in result["parts_seconds"].items()]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--architecture", default="sd3-medium", help="preset or folder (default sd3-medium)")
    parser.add_argument("--device", default="auto", help="default auto")
    parser.add_argument("--batch-size", type=int, default=8, help="default 8")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--compile", action="store_true", help="torch.compile")
    parser.add_argument("--peak", help="the device's name in estimates, or name:TFLOPS")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="any setting")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options)
    print(json.dumps(result, default=str) if options.json else text(result))


if __name__ == "__main__":
    main()
