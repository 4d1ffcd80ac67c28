"""How the cost of a training step grows with resolution, batch and parameters, and one law for all of it.

    python benchmarks/training_scaling.py FILE [--rounds 5] [--json]

Sweeps each from one base, by the bundled teacher's shape with random weights; draws FILE.png.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.state import AcceleratorState
from training_shape import RandomStudent, seconds_of

from teefusion.architectures import architecture
from teefusion.settings import load_settings

SWEEPS: dict[str, list[int]] = {"pixels": [32, 64, 96, 128], "batch": [4, 8, 16, 32], "layers": [2, 4, 8, 12]}
BASE = {"pixels": 64, "batch": 8, "layers": 4}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Step times over three sweeps from one base, and the law ``seconds = a + b * FLOPs`` over all of them.

    On a CPU they are CPU seconds.
    """
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
    size = BASE | {sweep: value}
    values = {"teacher.name": "shapes", "train.batch_size": size["batch"], "teacher.height": size["pixels"]}
    settings = load_settings(overrides=values | {"teacher.width": size["pixels"], "train.precision": "float32"})
    found = architecture(settings.teacher)
    larger = dict(found.transformer) | {"num_layers": size["layers"], "pos_embed_max_size": 64}
    student = RandomStudent(dataclasses.replace(found, transformer=larger), settings, options.device)
    flops = 3 * student.forward_flops()
    # On a CPU the seconds it worked for this process: who else uses the machine does not change the law.
    clock = time.process_time if options.device == "cpu" else time.perf_counter
    seconds = seconds_of(student, options.rounds, clock)
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"sweep": sweep, "value": value, "parameters": student.parameters, "flops": flops, "seconds": seconds}


def text(result: dict[str, Any]) -> str:
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


def plot(result: dict[str, Any], path: Path) -> None:
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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="where the plot goes, as FILE.png", metavar="FILE")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--rounds", type=int, default=5, help="default 5")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options)
    plot(result, options.file.with_suffix(".png"))
    print(json.dumps(result, default=str) if options.json else text(result))


if __name__ == "__main__":
    main()
