"""Seconds a forward of reflective teachers beside the plain CFG teacher's, measured in turns.

    python benchmarks/strategies.py [--teacher shapes] [--batch 64] [--steps 10] [--rounds 5] [--json]

A reflective step makes three batched calls where CFG makes one, and a weak leg of one branch calls with half a batch.
The ratio says what that costs beyond the forwards themselves; the aim is below 1.1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

STRATEGIES: dict[str, dict[str, Any]] = {
    "euler_cfg": {},
    "z_sampling": {"strategy.name": "z_sampling"},
    "w2sd": {"strategy.name": "w2sd"},
    "z_sampling, two weak branches": {"strategy.name": "z_sampling", "strategy.weak.guidance": 0.5},
}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a forward and picture: per strategy median, least and greatest over the rounds, and ratio to CFG."""
    import torch

    from teefusion.settings import load_settings
    from teefusion.strategies import make_strategy
    from teefusion.teachers import load_teacher

    shared = {"teacher.name": options.teacher, "strategy.num_steps": options.steps, "targets.states_per_trajectory": 1}
    settings = {name: load_settings(overrides=shared | values) for name, values in STRATEGIES.items()}
    teacher = load_teacher(settings["euler_cfg"].teacher, device=options.device)
    strategies = {name: make_strategy(chosen.strategy) for name, chosen in settings.items()}
    grid = teacher.grid(options.steps)
    denoiser = teacher.denoiser(teacher.encode(["a photo of a red star"] * options.batch), teacher.encode([""]))
    noise = torch.randn(options.batch, *teacher.latent_shape, device=teacher.device)
    s_B = torch.full([options.batch], 4.0, device=teacher.device)

    def seconds_a_forward(name: str) -> float:
        _synchronize()
        started, x = time.perf_counter(), noise
        for i in range(options.steps):
            x = strategies[name].step(denoiser, grid, x, i, s_B).x_next_BCHW
        _synchronize()
        return (time.perf_counter() - started) / (strategies[name].forwards(options.steps) * options.batch)

    def _synchronize() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    taken: dict[str, list[float]] = {name: [] for name in strategies}
    for round_number in range(options.rounds + 1):
        for name in strategies:
            seconds = seconds_a_forward(name)
            if round_number:  # the first pays for allocation
                taken[name].append(seconds)
    plain = taken["euler_cfg"]
    return {
        name: {
            "forwards_a_picture": strategies[name].forwards(options.steps),
            "seconds_a_forward": statistics.median(values),
            "least": min(values),
            "greatest": max(values),
            "ratio_to_cfg": statistics.median(value / base for value, base in zip(values, plain, strict=True)),
        }
        for name, values in taken.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--teacher", default="shapes", help="preset, folder or hub id (default shapes)")
    parser.add_argument("--device", default="auto", help="default auto")
    parser.add_argument("--batch", type=int, default=64, help="pictures (default 64)")
    parser.add_argument("--steps", type=int, default=10, help="default 10")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    results = measure(options)
    if options.json:
        sys.stdout.write(json.dumps(results) + "\n")
        return
    for name, values in results.items():
        spread = f"{values['least'] * 1e3:.3f} to {values['greatest'] * 1e3:.3f}"
        sys.stdout.write(
            f"{name:30s} {values['forwards_a_picture']:3d} forwards, {values['seconds_a_forward'] * 1e3:.3f} ms each "
            f"({spread}), {values['ratio_to_cfg']:.3f} of CFG's\n"
        )


if __name__ == "__main__":
    main()
