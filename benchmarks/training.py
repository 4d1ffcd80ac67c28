"""How fast a student is trained: beside a plain loop with its teacher online, on a published shape, and as sizes grow.

    python benchmarks/training.py [--steps 10] [--rounds 5] [--json]
    python benchmarks/training.py --architecture sd3-medium --device cuda [--batch-size 8] [--compile] [--json]
    python benchmarks/training.py --scaling docs/results/training_scaling [--json]

The first takes turns between this package's loop, from stored targets, and the loop a user of diffusers would write:
the teacher's guided velocity in the loop (two forwards in a batch of two, without gradient), then the same loss,
optimizer, clipping and average on stock parts. Both see the same states in the same order, so their losses have to
agree. The plain loop gets its states and text embeddings for nothing. ``speedup_same_step`` gives it our optimizer
step, too: what is left is the teacher. The share of time spent waiting for data is taken from a folder and from an S3
server here.

The second needs no checkpoint: random weights of that shape, and the time of a step in its parts. The third fits one
law to the time of a step over resolution, batch and parameters.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for the tests' S3 server


def synchronize(device: Any) -> None:
    """Wait for a GPU; nothing to wait for on a CPU."""
    import torch

    if str(device).startswith("cuda"):
        torch.cuda.synchronize(device)


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest over the rounds."""
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


# --- beside a plain loop ---------------------------------------------------------------------------------------------


class Ours:
    """This package's training, step by step, without its measurements and checkpoints."""

    def __init__(self, settings: Any, manifest: Any, store: Any, folder: Path) -> None:
        from teefusion.training import _Run

        self.run = _Run(settings, manifest, store, folder, [], tracked=False)
        self._batches, self.waited = self.run._batches(), 0.0

    def states(self) -> Any:
        """The next batch, on the device; counts the wait."""
        started = time.perf_counter()
        states = next(self._batches)
        self.waited += time.perf_counter() - started
        return states.to(self.run.device)

    def step(self) -> float:
        """One optimizer step; its loss."""
        return float(self.run._step(self.states()).loss)


class OnlineTeacher:
    """The guided velocity where a state is, as diffusers' pipeline computes it: two forwards in a batch of two."""

    def __init__(self, ours: Ours, settings: Any) -> None:
        from teefusion.teachers import load_teacher

        self._teacher = load_teacher(settings.teacher, device=str(ours.run.device))
        self._ours, self._null = ours, self._teacher.encode([""])

    def states(self) -> Any:
        """The next batch, whose velocities the teacher gives and not the store."""
        import torch

        states = self._ours.states()
        denoiser = self._teacher.denoiser(states.text, self._null)
        with torch.no_grad():
            with_text, without = denoiser.both(states.x_BCHW, states.sigma_B.repeat(2) * 1000.0)
        guided = without + states.guidance_B[:, None, None, None] * (with_text - without)
        return dataclasses.replace(states, velocity_BCHW=guided)


class PlainLoop:
    """The loop as a user of diffusers writes it: AdamW, autocast, EMAModel, and torch's attention as it comes."""

    def __init__(self, ours: Ours, settings: Any) -> None:
        import torch
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        from teefusion.fusion import fuse
        from teefusion.teachers import load_transformer

        self._teacher, self._ours, self._options = OnlineTeacher(ours, settings), ours, settings.train
        options, device = settings.train, ours.run.device
        self.model = fuse(load_transformer(settings.teacher)[0], ours.run.fusion).to(device).train()
        self.model.requires_grad_(True)
        betas = (options.adam_beta1, options.adam_beta2)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.learning_rate, betas=betas, weight_decay=options.weight_decay
        )
        self.schedule = get_scheduler(
            options.lr_schedule, self.optimizer, num_warmup_steps=options.warmup_steps, num_training_steps=options.steps
        )
        self.average = EMAModel(self.model.parameters(), decay=options.ema_decay)

    def step(self) -> float:
        """One optimizer step; its loss."""
        import torch

        from teefusion.distillation import distillation_loss

        states, run, options = self._teacher.states(), self._ours.run, self._options
        with torch.autocast(run.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            predicted = run._predict(self.model, states)
        loss = distillation_loss(
            predicted, states.velocity_BCHW, states.gap_B, weighting=options.loss_weighting, scale=run.gap_scale
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.parameters())
        return float(loss.detach())


class OnlineStep:
    """Our optimizer step on what the teacher gives online."""

    def __init__(self, ours: Ours, settings: Any) -> None:
        self._teacher, self._ours = OnlineTeacher(ours, settings), ours

    def step(self) -> float:
        """One optimizer step; its loss."""
        return float(self._ours.run._step(self._teacher.states()).loss)


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Samples a second of the loops, in turns; speed-ups are paired by round."""
    settings, manifest, store = stored_targets(options, folder)
    ours, copy, same = (Ours(settings, manifest, store, folder / str(k)) for k in range(3))
    ways: dict[str, Any] = {"ours": ours, "plain": PlainLoop(copy, settings), "same_step": OnlineStep(same, settings)}
    losses: dict[str, list[float]] = {way: [] for way in ways}
    rates: dict[str, list[float]] = {way: [] for way in ways}
    worked: dict[str, list[float]] = {way: [] for way in ways}
    waits = []
    for round_number in range(options.rounds + 1):
        for way, loop in ways.items():
            before, started, cpu = ours.waited, time.perf_counter(), time.process_time()
            losses[way] += [loop.step() for _ in range(options.steps)]
            seconds = time.perf_counter() - started
            if round_number:  # the first pays for allocation
                rates[way].append(options.steps * settings.train.batch_size / seconds)
                worked[way].append(time.process_time() - cpu)
                waits += [(ours.waited - before) / seconds] if way == "ours" else []
    faster = {way: [a / b for a, b in zip(rates["ours"], rates[way], strict=True)] for way in ("plain", "same_step")}
    less = {way: [b / a for a, b in zip(worked["ours"], worked[way], strict=True)] for way in ("plain", "same_step")}
    gaps = [abs(a - b) / b for a, b in zip(losses["ours"], losses["plain"], strict=True)]
    return {
        "teacher": options.teacher,
        "device": str(ours.run.device),
        "batch_size": settings.train.batch_size,
        "precision": settings.train.precision,
        "rounds": options.rounds,
        "steps_a_round": options.steps,
        "samples_per_second": {way: spread(values) for way, values in rates.items()},
        "speedup_vs_plain": statistics.median(faster["plain"]),
        "speedup_spread": [min(faster["plain"]), max(faster["plain"])],
        "speedup_same_step": statistics.median(faster["same_step"]),
        "cpu_seconds_vs_ours": {way: spread(values) for way, values in less.items()},  # steadier on a shared machine
        "data_wait_share": statistics.median(waits),
        "data_wait_share_s3": s3_wait(settings, manifest, store, folder, options) if options.s3 else None,
        "loss_gap": {"mean": statistics.mean(gaps), "greatest": max(gaps)},
        "last_losses": {way: values[-1] for way, values in losses.items()},
    }


def stored_targets(options: argparse.Namespace, folder: Path) -> tuple[Any, Any, Any]:
    """Settings of the teacher's preset, and a small target set of them."""
    from teefusion.prompts import load_prompt_set
    from teefusion.settings import load_settings
    from teefusion.sources import pin
    from teefusion.stages.ingest import ingest
    from teefusion.storage import FolderStore
    from teefusion.target_sets import generate_targets

    values = {"teacher.name": options.teacher, "workdir": folder / "work", "device": options.device}
    values |= {"targets.trajectories": options.trajectories, "targets.heldout_trajectories": 8}
    values |= {"train.steps": (options.rounds + 1) * options.steps, "train.warmup_steps": 1}
    settings = pin(load_settings(overrides=values | dict(options.set)))
    store = FolderStore(folder / "targets")
    return settings, generate_targets(settings, load_prompt_set(Path(ingest(settings).output)), store), store


def s3_wait(settings: Any, manifest: Any, store: Any, folder: Path, options: argparse.Namespace) -> float:
    """Share of the time that training from an S3 server waits for data, shards not yet in the cache."""
    import os

    from teefusion.cache import open_shards
    from teefusion.settings import StorageSettings
    from teefusion.storage import open_store
    from tests.s3 import BUCKET, ENVIRONMENT, s3_server

    os.environ.update(ENVIRONMENT)
    with s3_server() as url:
        storage = StorageSettings(endpoint_url=url, addressing_style="path")
        uri = f"s3://{BUCKET}/set"
        remote = open_store(uri, storage)
        for name in store.names():
            remote.write(name, store.read(name))
        settings = settings.model_copy(update={"storage": storage, "workdir": folder / "s3"})
        ours = Ours(settings, manifest, open_shards(settings, uri), folder / "s3")
        ours.step()  # the first window is read before anything can be trained on it
        ours.waited, started = 0.0, time.perf_counter()
        for _ in range(options.rounds * options.steps):
            ours.step()
        return ours.waited / (time.perf_counter() - started)


def compare_text(result: dict[str, Any]) -> str:
    """For people."""
    names = {"ours": "stored targets", "plain": "plain loop", "same_step": "online, our step"}
    lines = [
        f"{result['teacher']}, {result['batch_size']} states a step, {result['precision']}, on {result['device']}; "
        f"medians of {result['rounds']} rounds of {result['steps_a_round']} steps (least to greatest)"
    ]
    for way, rate in result["samples_per_second"].items():
        shown = f"{rate['median']:8.2f} ({rate['least']:.2f} to {rate['greatest']:.2f})"
        lines.append(f"{names[way]:16s} {shown} samples/s")
    low, high = result["speedup_spread"]
    wait = result["data_wait_share_s3"]
    lines += [
        f"{result['speedup_vs_plain']:.2f} times the plain loop ({low:.2f} to {high:.2f}), "
        f"{result['speedup_same_step']:.2f} times the same step with its teacher online",
        f"waiting for data: {result['data_wait_share']:.2%} of the time"
        + (f", from S3 {wait:.2%}" if wait is not None else ""),
        f"losses differ by {result['loss_gap']['mean']:.2%} on average, {result['loss_gap']['greatest']:.2%} at most",
    ]
    return "\n".join(lines)


# --- a shape with random weights -------------------------------------------------------------------------------------


class RandomStudent:
    """A student of an architecture, with random weights, states and text."""

    def __init__(self, found: Any, settings: Any, device: str) -> None:
        import torch

        from teefusion.engine import Engine
        from teefusion.fusion import fuse, make_fusion
        from teefusion.stream import States

        torch.manual_seed(0)
        self.settings, self.family, batch = settings, found.family, settings.train.batch_size
        outline = found.outline(device="cpu")
        latents = self.family.latent_shape(outline, settings.teacher.height, settings.teacher.width)
        tokens = self.family.text_tokens(outline, settings.teacher.max_sequence_length)
        width, pooled = (int(outline.transformer.config[n]) for n in ("joint_attention_dim", "pooled_projection_dim"))
        self.engine = Engine(settings.train, cpu=device == "cpu")
        self.engine.prepare(fuse(outline.transformer, make_fusion("affine")).train().requires_grad_(True))
        self.parameters = sum(weight.numel() for weight in self.engine.unwrapped.parameters())
        text = self.family_text(torch.randn(batch, tokens, width), torch.randn(batch, pooled))
        x_BCHW, velocity_BCHW = torch.randn(2, batch, *latents).half()
        ones = torch.ones(batch)
        self.null_P = torch.zeros(pooled, device=self.engine.device)
        self.states = States(x_BCHW, velocity_BCHW, ones * 0.5, ones * 4, ones, text, ones.long(), ones.long())

    @staticmethod
    def family_text(tokens_BTE: Any, pooled_BP: Any) -> Any:
        """Text as it is stored, in half the bytes."""
        from teefusion.families import TextEmbeddings

        return TextEmbeddings(tokens_BTE.bfloat16(), pooled_BP.bfloat16())

    def loss(self, states: Any) -> Any:
        """As in training."""
        from teefusion.distillation import distillation_loss
        from teefusion.fusion import pack

        packed = pack(states.text.pooled_BP, self.null_P, states.guidance_B)
        tokens = states.text.tokens_BTE.to(self.engine.input_dtype)
        predicted = self.family.velocity(self.engine.model, states.x_BCHW, states.sigma_B * 1000.0, tokens, packed)
        return distillation_loss(predicted, states.velocity_BCHW, states.gap_B, weighting="none", scale=1.0)

    def step(self) -> None:
        """One optimizer step, data and all."""
        states = self.states.to(self.engine.device)
        self.engine.step([lambda: self.loss(states)])
        synchronize(self.engine.device)

    def forward_flops(self) -> int:
        """Of the batch: two for each multiply-add of matrix products."""
        import torch
        from torch.utils.flop_counter import FlopCounterMode

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


def seconds_of(
    work: Callable[[], None], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, float]:
    """Of each call, after one that pays for allocation and compilation."""
    work()
    times = []
    for _ in range(rounds):
        started = clock()
        work()
        times.append(clock() - started)
    return spread(times)


def measure_shape(options: argparse.Namespace) -> dict[str, Any]:
    """Utilisation, memory and the parts of a step on one device."""
    import torch

    from teefusion.architectures import architecture
    from teefusion.devices import resolve_device
    from teefusion.estimates import device_reported_as, find_device
    from teefusion.settings import load_settings
    from teefusion.training_memory import estimate_memory

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
    seconds = seconds_of(student.step, options.rounds)
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


def shape_text(result: dict[str, Any]) -> str:
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


# --- as sizes grow ---------------------------------------------------------------------------------------------------

SWEEPS: dict[str, list[int]] = {"pixels": [32, 64, 96, 128], "batch": [4, 8, 16, 32], "layers": [2, 4, 8, 12]}
BASE = {"pixels": 64, "batch": 8, "layers": 4}


def measure_scaling(options: argparse.Namespace) -> dict[str, Any]:
    """Step times over three sweeps from one base, and the law ``seconds = a + b * FLOPs`` over all of them.

    On a CPU they are CPU seconds.
    """
    import numpy as np

    points = [_scaled(sweep, value, options) for sweep, values in SWEEPS.items() for value in values]
    flops = np.array([point["flops"] for point in points], dtype=float)
    seconds = np.array([point["seconds"]["median"] for point in points])
    # Relative errors count, or the largest step would be all that is fitted.
    (a, b), *_ = np.linalg.lstsq(np.stack([1 / seconds, flops / seconds], 1), np.ones_like(seconds), rcond=None)
    law = a + b * flops
    for point, value in zip(points, law, strict=True):
        point["law_seconds"] = float(value)
    return {
        "teacher": "shapes",
        "device": options.device,
        "base": BASE,
        "points": points,
        "law": {"overhead_seconds": float(a), "seconds_per_flop": float(b), "flops_per_second": float(1 / b)},
        "relative_error": {
            "median": float(np.median(np.abs(law - seconds) / seconds)),
            "greatest": float(np.max(np.abs(law - seconds) / seconds)),
        },
        "rounds": options.rounds,
    }


def _scaled(sweep: str, value: int, options: argparse.Namespace) -> dict[str, Any]:
    from accelerate.state import AcceleratorState

    from teefusion.architectures import architecture
    from teefusion.settings import load_settings

    size = BASE | {sweep: value}
    values = {"teacher.name": "shapes", "train.batch_size": size["batch"], "teacher.height": size["pixels"]}
    settings = load_settings(overrides=values | {"teacher.width": size["pixels"], "train.precision": "float32"})
    found = architecture(settings.teacher)
    larger = dict(found.transformer) | {"num_layers": size["layers"], "pos_embed_max_size": 64}
    student = RandomStudent(dataclasses.replace(found, transformer=larger), settings, options.device)
    flops = 3 * student.forward_flops()
    # On a CPU the seconds it worked for this process: who else uses the machine does not change the law.
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    seconds = seconds_of(student.step, options.rounds, clock)
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"sweep": sweep, "value": value, "parameters": student.parameters, "flops": flops, "seconds": seconds}


def scaling_text(result: dict[str, Any]) -> str:
    """For people, as Markdown."""
    law, error = result["law"], result["relative_error"]
    lines = [
        f"`seconds = {law['overhead_seconds']:.3g} + FLOPs / {law['flops_per_second']:.3g}` over all points; it misses "
        f"them by {error['median']:.1%} in the median, {error['greatest']:.1%} at most.",
        "",
        "| sweep | value | parameters | FLOPs a step | seconds (least to greatest) | by the law |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for point in result["points"]:
        s = point["seconds"]
        lines.append(
            f"| {point['sweep']} | {point['value']} | {point['parameters']:,} | {point['flops']:.3g} "
            f"| {s['median']:.4f} ({s['least']:.4f} to {s['greatest']:.4f}) | {point['law_seconds']:.4f} |"
        )
    return "\n".join(lines)


def plot_scaling(result: dict[str, Any], path: Path) -> None:
    """A panel a sweep: what was measured, with its spread, and the law."""
    import matplotlib as mpl
    import matplotlib.ticker

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(SWEEPS), figsize=(10, 3.4), sharey=True, layout="constrained")
    for panel, sweep in zip(panels, SWEEPS, strict=True):
        points = [point for point in result["points"] if point["sweep"] == sweep]
        key = "parameters" if sweep == "layers" else "value"
        x, middle = [point[key] for point in points], [point["seconds"]["median"] for point in points]
        low = [point["seconds"]["median"] - point["seconds"]["least"] for point in points]
        high = [point["seconds"]["greatest"] - point["seconds"]["median"] for point in points]
        panel.errorbar(x, middle, yerr=[low, high], fmt="o", capsize=3, label="measured, least to greatest")
        panel.plot(x, [point["law_seconds"] for point in points], label="a + b x FLOPs, one law for all")
        panel.set(xlabel={"pixels": "pixels a side", "batch": "states a step", "layers": "parameters"}[sweep])
        panel.set(xscale="log", yscale="log")
        panel.set_xticks(x, [f"{value / 1e6:.1f} M" if key == "parameters" else str(value) for value in x])
        panel.minorticks_off()
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("CPU seconds a step" if result["device"] == "cpu" else "seconds a step")
    panels[0].yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1, 2, 5)))
    panels[0].yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    panels[0].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


# --- command line ----------------------------------------------------------------------------------------------------


def setting(text: str) -> tuple[str, Any]:
    """A setting by its dotted name, as in ``train.zero_stage=2``."""
    import yaml

    key, _, value = text.partition("=")
    return key, yaml.safe_load(value)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", default="shapes", help="preset, folder or hub id (default shapes)")
    parser.add_argument("--architecture", help="a preset or folder whose shape to measure with random weights instead")
    parser.add_argument("--scaling", type=Path, help="measure how cost grows; writes FILE.png", metavar="FILE")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--steps", type=int, default=10, help="a round (default 10)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--trajectories", type=int, default=64, help="of the target set (default 64)")
    parser.add_argument("--no-s3", dest="s3", action="store_false", help="leave out the S3 server (needs moto)")
    parser.add_argument("--batch-size", type=int, default=8, help="with --architecture (default 8)")
    parser.add_argument("--compile", action="store_true", help="with --architecture: torch.compile")
    parser.add_argument("--peak", help="with --architecture: the device's name in estimates, or name:TFLOPS")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="any setting")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.architecture:
        result, write = measure_shape(options), shape_text
    elif options.scaling:
        result, write = measure_scaling(options), scaling_text
        plot_scaling(result, options.scaling.with_suffix(".png"))
    else:
        with tempfile.TemporaryDirectory() as folder:
            result, write = compare(options, Path(folder)), compare_text
    sys.stdout.write((json.dumps(result, default=str) if options.json else write(result)) + "\n")


if __name__ == "__main__":
    main()
