"""How fast targets are sampled, on the bundled teacher or on a published teacher's shape with random weights.

    python benchmarks/targets.py [--strategy w2sd] [--steps 20] [--batches 1,8,32,64] [--rounds 5] [--json]
    python benchmarks/targets.py --architecture sd3-medium --device cuda [--compile] [--batches 1,4,8] [--json]

The first takes turns between this package's batches and a plain loop over stock diffusers pieces, one prompt at a time
with the pipeline's own batch of two, and says how many trajectories a second each makes, and which share of our time
passes inside the transformer. Both encode their prompts; neither writes files. The aims on a CPU are a share of 95 %
and three times the plain loop's rate. The second needs no checkpoint: it says how many forwards a second a GPU makes,
and which share of its peak that is, to put in place of the one that estimates assume.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from measuring import spread, synchronize, timed

Rows = dict[str, Any]


class Clock:
    """Seconds inside a transformer's forwards. On a GPU it waits before and after each, which costs a little."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def on(self, transformer: Any, device: str) -> Iterator[Clock]:
        """Count while the block runs."""

        def enter(*_: Any) -> None:
            synchronize(device)
            self._entered = time.perf_counter()

        def leave(*_: Any) -> None:
            synchronize(device)
            self.seconds += time.perf_counter() - self._entered

        handles = [transformer.register_forward_pre_hook(enter), transformer.register_forward_hook(leave)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


# --- beside a plain loop ---------------------------------------------------------------------------------------------


def plain_loop(pipeline: Any, settings: Any, draws: list[Any], device: str) -> list[Rows]:
    """Kept states and velocities as a user of diffusers would write it over StableDiffusion3Pipeline's own parts.

    One prompt at a time, encoded when its turn comes with the negative one beside it; guidance in a batch of two, the
    branches as the stock pipeline has them, unconditional first. It makes as many forwards as ``targets.walk``.
    """
    import torch

    made = []
    for item in draws:
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            item.prompt,
            None,
            None,
            negative_prompt="",
            device=torch.device(device),
            max_sequence_length=settings.teacher.max_sequence_length,
        )
        branches = torch.cat([negative, embeds]), torch.cat([negative_pooled, pooled])
        pipeline.scheduler.set_timesteps(settings.strategy.num_steps, device=device)
        latents = item.noise_CHW[None].to(device, embeds.dtype)
        rows: Rows = {"x": [], "velocity": []}
        for i in range(settings.strategy.num_steps):
            following = plain_step(pipeline, settings.strategy.name, branches, latents, i, item.guidance)
            if i in item.steps_K:
                width = pipeline.scheduler.sigmas[i + 1] - pipeline.scheduler.sigmas[i]
                rows["x"].append(latents[0].float().cpu())
                rows["velocity"].append(((following.float() - latents.float()) / width)[0].cpu())
            latents = following
        made.append({name: torch.stack(values) for name, values in rows.items()})
    return made


def plain_step(pipeline: Any, strategy: str, branches: tuple[Any, Any], latents: Any, i: int, guidance: float) -> Any:
    """The next latents: a guided Euler step; where the strategy reflects, a step, a weak step back, and a step."""
    scheduler = pipeline.scheduler
    if strategy != "euler_cfg" and i < len(scheduler.timesteps) - 1:
        h = (scheduler.sigmas[i + 1] - scheduler.sigmas[i]).to(latents.dtype)
        there = latents + h * plain_guided(pipeline, branches, latents, scheduler.timesteps[i], guidance)
        # Z-Sampling goes back with the empty prompt, W2SD with the prompt and no guidance: one branch each.
        side = slice(0, 1) if strategy == "z_sampling" else slice(1, 2)
        weak = plain_call(pipeline, tuple(part[side] for part in branches), there, scheduler.timesteps[i + 1])
        latents = there - h * weak
    velocity = plain_guided(pipeline, branches, latents, scheduler.timesteps[i], guidance)
    return scheduler.step(velocity, scheduler.timesteps[i], latents, return_dict=False)[0]


def plain_guided(pipeline: Any, branches: tuple[Any, Any], latents: Any, timestep: Any, guidance: float) -> Any:
    """Classifier-free guidance as in the stock pipeline."""
    import torch

    without, with_text = plain_call(pipeline, branches, torch.cat([latents] * 2), timestep).chunk(2)
    return without + guidance * (with_text - without)


def plain_call(pipeline: Any, branches: tuple[Any, ...], latents: Any, timestep: Any) -> Any:
    """One call of the stock transformer."""
    return pipeline.transformer(
        hidden_states=latents,
        timestep=timestep.expand(len(latents)),
        encoder_hidden_states=branches[0],
        pooled_projections=branches[1],
        return_dict=False,
    )[0]


class Laptop:
    """A real teacher with prompts of its own, sampled by this package and by the plain loop."""

    def __init__(self, options: argparse.Namespace) -> None:
        from teefusion.prompt_files import read_prompts
        from teefusion.prompts import build_prompt_set
        from teefusion.settings import load_settings
        from teefusion.sources import prompt_path
        from teefusion.strategies import make_strategy
        from teefusion.teachers import load_teacher

        self.settings = load_settings(
            overrides={
                "teacher.name": options.teacher,
                "strategy.name": options.strategy,
                "strategy.num_steps": options.steps,
                "targets.states_per_trajectory": min(8, options.steps),
            }
        )
        self.teacher = load_teacher(self.settings.teacher, device=options.device)
        self.strategy = make_strategy(self.settings.strategy)
        self.grid = self.teacher.grid(options.steps)
        self.null = self.teacher.encode([""])  # once a set, as when targets are made
        source = self.settings.prompts
        self.prompts = build_prompt_set(
            read_prompts(prompt_path(source.source)),
            heldout_fraction=source.heldout_fraction,
            max_chars=source.max_chars,
        ).train

    def draws(self, count: int) -> list[Any]:
        """Of the first trajectories."""
        from teefusion.targets import draw

        chosen = [self.prompts[j % len(self.prompts)] for j in range(count)]
        return [draw(self.settings, "train", j, prompt, self.teacher.latent_shape) for j, prompt in enumerate(chosen)]

    def ours(self, count: int, batch: int) -> list[Rows]:
        """``count`` trajectories in batches: draws, prompt encoding, the walk."""
        from teefusion.targets import walk

        draws, rows = self.draws(count), []
        for start in range(0, count, batch):
            members = draws[start : start + batch]
            text = self.teacher.encode([item.prompt for item in members])
            rows.append(walk(self.teacher, self.strategy, self.grid, text, self.null, members))
        return rows

    def plain(self, count: int) -> list[Rows]:
        """``count`` trajectories by the plain loop."""
        import torch

        with torch.no_grad():
            return plain_loop(self.teacher.pipeline, self.settings, self.draws(count), self.teacher.device)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Trajectories a second of the plain loop and of each batch size, in turns; speed-ups are paired by round."""
    bench = Laptop(options)
    device, transformer = bench.teacher.device, bench.teacher.pipeline.transformer
    plain: list[float] = []
    rates: dict[int, list[float]] = {batch: [] for batch in options.batches}
    shares: dict[int, list[float]] = {batch: [] for batch in options.batches}
    for round_number in range(options.rounds + 1):
        taken = options.trajectories / timed(partial(bench.plain, options.trajectories), device)
        if round_number:  # the first pays for allocation
            plain.append(taken)
        for batch in options.batches:
            count = batch * math.ceil(options.trajectories / batch)
            with Clock().on(transformer, device) as clock:
                seconds = timed(partial(bench.ours, count, batch), device)
            if round_number:
                rates[batch].append(count / seconds)
                shares[batch].append(clock.seconds / seconds)
    best = max(rates, key=lambda batch: statistics.median(rates[batch]))
    faster = spread([ours / base for ours, base in zip(rates[best], plain, strict=True)])
    return {
        "teacher": options.teacher,
        "strategy": options.strategy,
        "num_steps": options.steps,
        "device": device,
        "rounds": options.rounds,
        "forwards_a_trajectory": bench.strategy.forwards(options.steps),
        "plain_trajectories_a_second": spread(plain),
        "batches": {
            batch: {"trajectories_a_second": spread(rates[batch]), "transformer_share": spread(shares[batch])}
            for batch in options.batches
        },
        "best_batch": best,
        "transformer_share": statistics.median(shares[best]),
        "speedup_vs_naive": faster["median"],
        "speedup_spread": [faster["least"], faster["greatest"]],
    }


def compare_text(result: dict[str, Any]) -> str:
    """For people."""
    plain = result["plain_trajectories_a_second"]
    lines = [
        f"{result['teacher']}, {result['strategy']}, {result['num_steps']} steps, {result['forwards_a_trajectory']} "
        f"forwards a trajectory, on {result['device']}; medians of {result['rounds']} rounds (least to greatest)",
        f"{'plain loop':12s} {_rate(plain)} trajectories/s",
    ]
    for batch, values in result["batches"].items():
        share = values["transformer_share"]["median"]
        rate = _rate(values["trajectories_a_second"])
        lines.append(f"{f'batch {batch}':12s} {rate} trajectories/s, {share:.1%} of the time in the transformer")
    low, high = result["speedup_spread"]
    lines.append(
        f"best: batch {result['best_batch']}, {result['speedup_vs_naive']:.2f} times the plain loop "
        f"({low:.2f} to {high:.2f}), {result['transformer_share']:.1%} in the transformer"
    )
    return "\n".join(lines)


def _rate(values: dict[str, float]) -> str:
    return f"{values['median']:8.3f} ({values['least']:.3f} to {values['greatest']:.3f})"


# --- a published shape ------------------------------------------------------------------------------------------------


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

    def sampler(self, batch: int) -> Callable[[], Rows]:
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
        with Clock().on(bench.teacher.pipeline.transformer, device) as clock:
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
            parts = [f"{_rate(values['forwards_a_second'])} forwards/s"]
            parts.append("peak of this device unknown: give --peak" if used is None else f"{used:.1%} of the peak")
            parts += [f"{memory / 1e9:.1f} GB"] if memory is not None else []
            parts += [f"{share:.1%} of the time in the transformer"] if share is not None else []
            lines.append(f"{mode:9s} batch {batch!s:3s} " + ", ".join(parts))
    return "\n".join(lines)


# --- command line ----------------------------------------------------------------------------------------------------


def sizes(value: str) -> list[int]:
    """Batch sizes, as in ``1,8,64``."""
    found = [int(part) for part in value.split(",")]
    if min(found) < 1:
        raise ValueError(value)
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", default="shapes", help="preset, folder or hub id of an SD3 (default shapes)")
    parser.add_argument("--architecture", help="a preset or folder whose shape to measure with random weights instead")
    parser.add_argument("--strategy", default="euler_cfg", choices=["euler_cfg", "z_sampling", "w2sd"])
    parser.add_argument("--device", default="auto", help="default auto")
    parser.add_argument("--steps", type=int, help="default 20, with --architecture 4")
    parser.add_argument("--batches", type=sizes, help="batch sizes (default 1,8,32,64; with --architecture 1,4,8)")
    parser.add_argument("--trajectories", type=int, default=8, help="at least, a round and batch size (default 8)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--compile", action="store_true", help="with --architecture: measure torch.compile too")
    parser.add_argument("--peak", help="with --architecture: the device's name in estimates, or name:TFLOPS")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    options.steps = options.steps or (4 if options.architecture else 20)
    options.batches = options.batches or ([1, 4, 8] if options.architecture else [1, 8, 32, 64])
    try:
        result = measure_shape(options) if options.architecture else compare(options)
    except ModuleNotFoundError as error:
        sys.exit(f"benchmarks/targets.py: {error}. It needs the models' libraries: pip install 'teefusion[train]'.")
    write = shape_text if options.architecture else compare_text
    sys.stdout.write((json.dumps(result) if options.json else write(result)) + "\n")


if __name__ == "__main__":
    main()
