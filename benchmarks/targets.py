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
import json
import math
import statistics
import sys
from functools import partial
from typing import Any

from measuring import ForwardClock, rate_text, spread, timed
from plain_sampling import plain_loop
from targets_shape import measure_shape, shape_text


class RealTeacher:
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

    def ours(self, count: int, batch: int) -> list[dict[str, Any]]:
        """``count`` trajectories in batches: draws, prompt encoding, the walk."""
        from teefusion.targets import walk

        draws, rows = self.draws(count), []
        for start in range(0, count, batch):
            members = draws[start : start + batch]
            text = self.teacher.encode([item.prompt for item in members])
            rows.append(walk(self.teacher, self.strategy, self.grid, text, self.null, members))
        return rows

    def plain(self, count: int) -> list[dict[str, Any]]:
        """``count`` trajectories by the plain loop."""
        import torch

        with torch.no_grad():
            return plain_loop(self.teacher.pipeline, self.settings, self.draws(count), self.teacher.device)


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Trajectories a second of the plain loop and of each batch size, in turns; speed-ups are paired by round."""
    bench = RealTeacher(options)
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
            with ForwardClock().on(transformer, device) as clock:
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
        f"{'plain loop':12s} {rate_text(plain)} trajectories/s",
    ]
    for batch, values in result["batches"].items():
        share = values["transformer_share"]["median"]
        rate = rate_text(values["trajectories_a_second"])
        lines.append(f"{f'batch {batch}':12s} {rate} trajectories/s, {share:.1%} of the time in the transformer")
    low, high = result["speedup_spread"]
    lines.append(
        f"best: batch {result['best_batch']}, {result['speedup_vs_naive']:.2f} times the plain loop "
        f"({low:.2f} to {high:.2f}), {result['transformer_share']:.1%} in the transformer"
    )
    return "\n".join(lines)


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
