"""How often the gate's intervals err: false passes and power, by simulation; no model, one core, about a minute.

    python benchmarks/gate.py [--trials 4000] [--output docs/results] [--json]

A false pass is a student that is truly worse by the margin, and passes. Two such students are tried: one that is worse
by ``gate.margin`` in every style, and one worse by ``gate.style_margin`` in a single style, which the others make good.
Power is the share of students as good as their teacher that pass. Differences between student and teacher come from
several families of one spread, that of the demo (4 % of the teacher's mean, a prompt). The families in STRESS are worse
than any we measured; they are shown, and are no part of the headline. The teacher's mean is taken as known.

``teefusion.intervals`` draws the same prompts for a seed whatever the scores, so one matrix resamples all trials.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from teefusion.settings import GateSettings

Sample = Callable[[np.random.Generator, tuple[int, int]], np.ndarray]
STYLES = 4
SPREAD = 0.04  # standard deviation of a prompt's difference, as a share of the teacher's mean
SIZES = (20, 80, 800)  # prompts a style
FAMILIES: dict[str, Sample] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails (t, 4 degrees)": lambda rng, shape: rng.standard_t(4, shape) / 2**0.5,
    "skewed to losses (exponential)": lambda rng, shape: 1 - rng.exponential(size=shape),
    "a tenth of the prompts lost": lambda rng, shape: _lost(rng, shape, 0.1),
}
STRESS: dict[str, Sample] = {
    "a twentieth of the prompts lost": lambda rng, shape: _lost(rng, shape, 0.05),
    "skewed to losses (lognormal)": lambda rng, shape: _lognormal(rng, shape),
}


def _lost(rng: np.random.Generator, shape: tuple[int, int], share: float) -> np.ndarray:
    """A share of prompts falls far, the others stay about equal."""
    fallen = (rng.random(shape) < share) - share
    return -fallen / (share * (1 - share)) ** 0.5 * 0.96 + 0.28 * rng.standard_normal(shape)


def _lognormal(rng: np.random.Generator, shape: tuple[int, int]) -> np.ndarray:
    return -(rng.lognormal(size=shape) - np.exp(0.5)) / ((np.e - 1) * np.e) ** 0.5


@cache
def resampling(n: int, resamples: int, seed: int) -> np.ndarray:
    """[R, N]: how much each of n prompts weighs in each resample that ``intervals.resampled_means`` draws."""
    rng = np.random.default_rng(seed)
    return np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)]).astype("f4") / n


def lower_bounds(differences_NT: np.ndarray, rules: GateSettings) -> np.ndarray:
    """[T]: the interval's lower end of each trial; see ``intervals.paired_interval``."""
    with_worst = np.concatenate([differences_NT, differences_NT.min(axis=0, keepdims=True)]).astype("f4")
    means_RT = resampling(len(with_worst), rules.resamples, rules.seed) @ with_worst
    return np.quantile(means_RT, (1 - rules.confidence) / 2, axis=0, method="lower")


def passes(differences: list[np.ndarray], rules: GateSettings) -> np.ndarray:
    """[T]: whether each trial passes, given the differences [N, T] of each style as shares of the teacher's mean."""
    styles = [lower_bounds(style_NT, rules) >= -rules.style_margin for style_NT in differences]
    overall = lower_bounds(np.concatenate(differences), rules) >= -rules.margin
    return np.logical_and.reduce([overall, *styles])


def measure(n: int, family: Sample, rules: GateSettings, trials: int) -> dict[str, Any]:
    """False passes of both kinds of worse student, and the curve of passes over true differences."""
    rng = np.random.default_rng([n, trials])
    noise = [SPREAD * family(rng, (n, trials)) for _ in range(STYLES)]
    one_worse = [noise[0] - rules.style_margin, *(style_NT + rules.style_margin for style_NT in noise[1:])]
    # A shift of all scores shifts every bound, so one resampling gives the whole curve.
    lows = np.stack([lower_bounds(style_NT, rules) for style_NT in noise]).min(axis=0)
    overall = lower_bounds(np.concatenate(noise), rules)
    shifts = np.linspace(-1.5 * rules.style_margin, rules.margin, 81)
    curve = [
        float(((overall + shift >= -rules.margin) & (lows + shift >= -rules.style_margin)).mean()) for shift in shifts
    ]
    all_worse = (overall - rules.margin >= -rules.margin) & (lows - rules.margin >= -rules.style_margin)
    return {
        "false_pass_all_styles": float(all_worse.mean()),
        "false_pass_one_style": float(passes(one_worse, rules).mean()),
        "power": float(((overall >= -rules.margin) & (lows >= -rules.style_margin)).mean()),
        "curve": list(zip(shifts.tolist(), curve, strict=True)),
    }


def run(trials: int, rules: GateSettings) -> dict[str, Any]:
    """Everything; the headline is the worst over FAMILIES."""
    table = {
        name: {n: measure(n, family, rules, trials) for n in SIZES} for name, family in (FAMILIES | STRESS).items()
    }
    headline: dict[str, Any] = {}
    for n in (80, 800):
        of_n = [table[name][n] for name in FAMILIES]
        worst = max(max(row["false_pass_all_styles"], row["false_pass_one_style"]) for row in of_n)
        headline |= {f"false_pass_n{n}": worst, f"power_n{n}": min(row["power"] for row in of_n)}
    return headline | {"trials": trials, "spread": SPREAD, "rules": rules.model_dump(mode="json"), "families": table}


def plot(result: dict[str, Any], file: Path) -> None:
    """Passes over the true difference, a panel a size."""
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(SIZES), figsize=(13, 4.2), sharey=True, layout="constrained")
    for n, axes in zip(SIZES, panels, strict=True):
        for name, rows in result["families"].items():
            shifts, shares = zip(*rows[n]["curve"], strict=True)
            line = "--" if name in STRESS else "-"
            axes.plot([100 * shift for shift in shifts], [100 * share for share in shares], line, label=name)
        axes.axvline(-100 * result["rules"]["margin"], color="grey", linewidth=1)
        axes.axhline(5, color="grey", linewidth=1, linestyle=":")
        axes.set_title(f"{n} prompts a style")
        axes.set_xlabel("true difference in every style, % of the teacher's mean")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("students that pass, %")
    panels[-1].legend(fontsize=8)
    figure.savefig(file, dpi=110)


def page(result: dict[str, Any]) -> str:
    """The results as Markdown."""
    rules = result["rules"]
    lines = [
        "# How often the gate errs",
        "",
        f"By simulation (`python benchmarks/gate.py --output docs/results`): {result['trials']:,} students a cell, "
        f"{STYLES} styles, {rules['resamples']:,} resamples, {100 * rules['confidence']:g} % interval, differences "
        f"with a standard deviation of {100 * result['spread']:g} % of the teacher's mean a prompt. Margins: "
        f"{100 * rules['margin']:g} % overall, {100 * rules['style_margin']:g} % in a style.",
        "",
        "![Share of students that pass, over their true difference](gate.png)",
        "",
        "| differences | prompts a style | worse in all styles passes | worse in one style passes | as good passes |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, rows in result["families"].items():
        for n, row in rows.items():
            values = (row["false_pass_all_styles"], row["false_pass_one_style"], row["power"])
            cells = " | ".join(f"{100 * value:.1f} %" for value in values)
            lines.append(f"| {name}{' (stress)' if name in STRESS else ''} | {n} | {cells} |")
    lines += [
        "",
        f"Worst of the families that are no stress test: {100 * result['false_pass_n80']:.1f} % false passes with 80 "
        f"prompts a style, {100 * result['false_pass_n800']:.1f} % with 800. A student that loses few prompts "
        "wholly is what a small sample misses: with 20 prompts, the least that `gate.min_prompts` allows, a third of "
        "such students pass, because nothing of it is among their prompts. Use 80.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=4000, help="students a cell (default 4000)")
    parser.add_argument("--resamples", type=int, default=2000, help="default 2000; the gate's own default is 10,000")
    parser.add_argument("--output", type=Path, help="folder for gate.md and gate.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = run(options.trials, GateSettings(resamples=options.resamples))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        plot(result, options.output / "gate.png")
        (options.output / "gate.md").write_text(page(result), encoding="utf-8")
    headline = {name: value for name, value in result.items() if isinstance(value, float)}
    sys.stdout.write((json.dumps(result) if options.json else json.dumps(headline, indent=2)) + "\n")


if __name__ == "__main__":
    main()
