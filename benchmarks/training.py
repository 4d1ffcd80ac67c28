"""How fast a student is trained, beside the loop that a user of diffusers would write with its teacher online.

    python benchmarks/training.py [--steps 10] [--rounds 5] [--json]

Takes turns between this package's loop, from stored targets, and the plain one: the teacher's guided velocity in the
loop (two forwards in a batch of two, without gradient), then the same loss, optimizer, clipping and average on stock
parts. Both see the same states in the same order, so their losses have to agree. The plain loop gets its states and
text embeddings for nothing. ``speedup_same_step`` gives it our optimizer step, too: what is left is the teacher. The
share of time spent waiting for data is taken from a folder and from an S3 server here.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from measuring import setting, spread

from teefusion.cache import open_shards
from teefusion.distillation import distillation_loss
from teefusion.fusion import fuse
from teefusion.prompts import load_prompt_set
from teefusion.settings import StorageSettings, load_settings
from teefusion.sources import pin
from teefusion.stages.ingest import ingest
from teefusion.storage import FolderStore, open_store
from teefusion.strategies import guide
from teefusion.target_sets import generate_targets
from teefusion.teachers import load_teacher, load_transformer
from teefusion.training_run import Run


class Ours:
    """This package's training, step by step, without its measurements and checkpoints."""

    def __init__(self, settings: Any, manifest: Any, store: Any, folder: Path) -> None:
        self.run = Run(settings, manifest, store, folder, tracked=False)
        self._batches, self.waited = self.run.batches(), 0.0

    def states(self) -> Any:
        """The next batch, on the device; counts the wait."""
        started = time.perf_counter()
        states = next(self._batches)
        self.waited += time.perf_counter() - started
        return states.to(self.run.device)

    def step(self) -> float:
        """One optimizer step; its loss."""
        return float(self.run.step(self.states()).loss)


class OnlineStep(Ours):
    """Our step, but the teacher gives velocities as diffusers' pipeline does: two forwards in a batch of two."""

    def __init__(self, settings: Any, manifest: Any, store: Any, folder: Path) -> None:
        super().__init__(settings, manifest, store, folder)
        self._teacher = load_teacher(settings.teacher, device=str(self.run.device))
        self._null = self._teacher.encode([""])

    def states(self) -> Any:
        """The next batch, whose velocities the teacher gives and not the store."""
        states = super().states()
        denoiser = self._teacher.denoiser(states.text, self._null)
        with torch.no_grad():
            branches = denoiser.both(states.x_BCHW, states.sigma_B.repeat(2) * 1000.0)
        return dataclasses.replace(states, velocity_BCHW=guide(*branches, states.guidance_B))


class PlainLoop(OnlineStep):
    """The loop as a user of diffusers writes it: AdamW, autocast, EMAModel, and torch's attention as it comes."""

    def __init__(self, settings: Any, manifest: Any, store: Any, folder: Path) -> None:
        super().__init__(settings, manifest, store, folder)
        options = self._options = settings.train
        student, _ = load_transformer(settings.teacher)
        self.model = fuse(student, self.run.student.fusion).to(self.run.device).train().requires_grad_(True)
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
        at, student, options = self.states(), self.run.student, self._options
        with torch.autocast(self.run.device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            predicted = student.velocity(self.model, at.x_BCHW, at.sigma_B, at.guidance_B, at.text)
        loss = distillation_loss(
            predicted, at.velocity_BCHW, at.gap_B, weighting=options.loss_weighting, scale=student.gap_scale
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.average.step(self.model.parameters())
        return float(loss.detach())


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Samples a second of the loops, in turns; speed-ups are paired by round."""
    settings, manifest, store = stored_targets(options, folder)
    loops: dict[str, type[Ours]] = {"ours": Ours, "plain": PlainLoop, "same_step": OnlineStep}
    ways = {way: loop(settings, manifest, store, folder / way) for way, loop in loops.items()}
    ours = ways["ours"]
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
    values = {"teacher.name": options.teacher, "workdir": folder / "work", "device": options.device}
    values |= {"targets.trajectories": options.trajectories, "targets.heldout_trajectories": 8}
    values |= {"train.steps": (options.rounds + 1) * options.steps, "train.warmup_steps": 1}
    settings = pin(load_settings(overrides=values | dict(options.set)))
    store = FolderStore(folder / "targets")
    return settings, generate_targets(settings, load_prompt_set(Path(ingest(settings).output)), store), store


def s3_wait(settings: Any, manifest: Any, store: Any, folder: Path, options: argparse.Namespace) -> float:
    """Share of the time that training from an S3 server waits for data, shards not yet in the cache."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from tests.s3 import BUCKET, ENVIRONMENT, s3_server

    with patch.dict(os.environ, ENVIRONMENT), s3_server() as url:
        storage = StorageSettings(endpoint_url=url, addressing_style="path")
        uri = f"s3://{BUCKET}/set"
        remote = open_store(uri, storage)
        for name in store.sizes():
            remote.write(name, store.read(name))
        settings = settings.model_copy(update={"storage": storage, "workdir": folder / "s3"})
        ours = Ours(settings, manifest, open_shards(settings, uri), folder / "s3")
        ours.step()  # the first window is read before anything can be trained on it
        ours.waited, started = 0.0, time.perf_counter()
        for _ in range(options.rounds * options.steps):
            ours.step()
        return ours.waited / (time.perf_counter() - started)


def text(result: dict[str, Any]) -> str:
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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", default="shapes", help="preset, folder or hub id (default shapes)")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--steps", type=int, default=10, help="a round (default 10)")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--trajectories", type=int, default=64, help="of the target set (default 64)")
    parser.add_argument("--no-s3", dest="s3", action="store_false", help="leave out the S3 server (needs moto)")
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="KEY=VALUE", help="any setting")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.s3 and importlib.util.find_spec("moto") is None:
        parser.error("the S3 server here is moto's, which is not installed: `make install-dev`, or give --no-s3")
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(json.dumps(result, default=str) if options.json else text(result))


if __name__ == "__main__":
    main()
