"""The paper's table on the bundled teacher: teachers, students, ablations and baselines, in one run.

    python benchmarks/method.py --workdir WORK --output docs/results [--rows REGEX] [--seeds 3] [--json]

Writes OUTPUT/method.csv (a line a row and seed), method.md (means and standard errors over seeds) and method.png.
A teacher's seed is its noise, a student's that of its training and of its noise. What a row needs is kept in WORK and
found again, so an interrupted run goes on. Seconds a picture, with text encoding and decoding, are taken last, all rows
in turns and as many rounds as seeds, on every run anew: compare them within one run only, on a machine left alone.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

SHARED = {"targets.heldout_trajectories": 64, "mlflow.experiment": "method"}
_TIMED_PICTURES = 32
W2SD, Z_SAMPLING = {"strategy.name": "w2sd"}, {"strategy.name": "z_sampling"}


@dataclass(frozen=True)
class Row:
    """One line of the table: settings, and whether a student is trained for it."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    guidance: float | None = None
    """None is that of the comparison."""
    num_steps: int | None = None
    """None is that of the comparison."""
    student: bool = False


@dataclass(frozen=True)
class Result:
    """One measurement; the columns of method.csv."""

    row: str
    seed: int
    score_overall: float
    score_anime: float
    score_concept_art: float
    score_paintings: float
    score_photo: float
    nfe: float
    seconds_per_image: float
    guidance_residual: float | None


def rows(num_steps: int, s: float) -> list[Row]:
    """The table. Plain CFG comes at the reflective teachers' effective guidance and at their price, too.

    And W2SD at the scale whose effective guidance is plain CFG's: at s, it guides as CFG does at 2s - 1.
    """
    price = 5 * num_steps - 3  # of both reflective teachers, whose weak leg needs one branch
    teachers = [
        Row("unguided", guidance=1.0),
        Row("cfg"),
        Row("cfg_at_guidance_of_w2sd", guidance=2 * s - 1),
        Row("cfg_at_guidance_of_z_sampling", guidance=2 * s),
        Row("cfg_at_nfe_of_reflection", num_steps=round(price / 2)),
        Row("z_sampling", Z_SAMPLING),
        Row("w2sd", W2SD),
        Row("w2sd_at_guidance_of_cfg", W2SD, guidance=(s + 1) / 2),
    ]
    students = [
        Row("distill_cfg_of_cfg", {"fusion.variant": "distill_cfg"}, student=True),
        Row("teefusion_of_cfg", student=True),
        Row("teefusion_of_z_sampling", Z_SAMPLING, student=True),
        Row("teefusion_of_w2sd", W2SD, student=True),
        Row("teefusion_of_w2sd_at_guidance_of_cfg", W2SD, guidance=(s + 1) / 2, student=True),
        *(
            Row(f"{variant}_of_cfg", {"fusion.variant": variant}, student=True)
            for variant in ("balanced", "paper", "published", "linear", "unmodulated")
        ),
    ]
    few = [
        Row(f"teefusion_of_w2sd_{n}_steps", W2SD | {"student.num_steps": n}, student=True)
        for n in (25, 12, 8, 4)
        if n < num_steps
    ]
    return teachers + students + few


@dataclass
class Made:
    """What a row needs to draw, and what its student's training measured."""

    sampler: Any
    prompts: list[Any]
    settings: Any
    device: str
    guidance_residual: float | None


def make(row: Row, seed: int, options: argparse.Namespace) -> Made:
    """Find or make targets and student, and load them."""
    from teefusion.evaluation import choose_prompts
    from teefusion.prompts import load_prompt_set
    from teefusion.samplers import samplers
    from teefusion.settings import load_settings
    from teefusion.sources import pin
    from teefusion.stages.ingest import ingest
    from teefusion.stages.targets import targets
    from teefusion.stages.train import train
    from teefusion.students import load_student
    from teefusion.teachers import load_teacher
    from teefusion.weights import with_weights

    values: dict[str, Any] = SHARED | {
        "workdir": options.workdir,
        "strategy.num_steps": options.num_steps,
        "targets.trajectories": options.trajectories,
        "targets.states_per_trajectory": options.num_steps,
        "train.steps": options.steps,
        "train.seed": seed,
        "evaluate.seed": seed + 1,
        "evaluate.guidance_scale": row.guidance or options.guidance_scale,
        "evaluate.prompts_per_style": options.prompts_per_style,
    }
    if row.num_steps:
        values["evaluate.num_steps"] = row.num_steps
    settings = pin(load_settings(overrides=values | row.settings))
    prompts = Path(ingest(settings).output)
    residual = None
    if row.student:
        trained = train(settings, prompts, targets(settings, prompts).output)
        residual, folder = trained.details["guidance_residual"], Path(trained.details["student"])
    teacher = with_weights(load_teacher(settings.teacher, device=settings.device), settings.strategy)
    dtype = teacher.pipeline.transformer.dtype
    student = load_student(folder, device=teacher.device, dtype=dtype) if row.student else teacher.pipeline
    sampler = samplers(settings, teacher, student)["student" if row.student else "teacher"]
    chosen = choose_prompts(load_prompt_set(prompts).heldout, settings.evaluate)
    return Made(sampler, chosen, settings, teacher.device, residual)


def measure(row: Row, seed: int, options: argparse.Namespace) -> Result:
    """Draw and score a row's pictures; its time is taken by ``take_time``."""
    from teefusion.evaluation import score_rows
    from teefusion.scorer_sources import scorer_of
    from teefusion.scoring import load_scorer

    made = make(row, seed, options)
    scorer = load_scorer(scorer_of(made.settings), device=made.device)
    pictures = options.workdir / "rows" / f"{row.name}-{seed}"
    scores = score_rows({row.name: made.sampler}, scorer, made.prompts, made.settings.evaluate, pictures)[row.name]
    styles = {
        style: statistics.fmean(
            score for score, prompt in zip(scores, made.prompts, strict=True) if prompt.style == style
        )
        for style in {prompt.style for prompt in made.prompts}
    }
    return Result(
        row=row.name,
        seed=seed,
        score_overall=statistics.fmean(scores),
        **{f"score_{style.replace('-', '_')}": value for style, value in styles.items()},
        nfe=made.sampler.nfe,
        seconds_per_image=math.nan,
        guidance_residual=made.guidance_residual,
    )


def take_time(row: Row, seed: int, options: argparse.Namespace) -> float:
    """Seconds a picture of one batch, after one that is not counted."""
    made = make(row, seed, options)
    made.sampler.warm_up(made.prompts[:8])
    made.sampler(made.prompts[:_TIMED_PICTURES])
    return float(made.sampler.seconds[0])


def measured(row: Row, seed: int, options: argparse.Namespace) -> Result | None:
    """The measurement, taken or found; none where it is not there and only such are asked for.

    It is kept under what determines it.
    """
    from teefusion.files import content_key, read_json, write_json

    where = ("workdir", "output", "rows", "seeds", "untimed", "found", "json")
    asked = {name: value for name, value in vars(options).items() if name not in where}
    file = options.workdir / "rows" / f"{content_key([asdict(row), seed, asked])}.json"
    if not file.exists():
        if options.found:
            return None
        values = asdict(measure(row, seed, options))
        write_json(file, {name: value for name, value in values.items() if name != "seconds_per_image"})
    return Result(**read_json(file), seconds_per_image=math.nan)


def table(results: list[Result]) -> str:
    """Means and standard errors over seeds, in Markdown."""
    names = list(dict.fromkeys(result.row for result in results))
    columns = [item.name for item in fields(Result) if item.name not in ("row", "seed")]
    lines = ["| row | seeds | " + " | ".join(columns) + " |", "| --- " * (len(columns) + 2) + "|"]
    for name in names:
        members = [result for result in results if result.row == name]
        cells = [_mean([getattr(result, column) for result in members]) for column in columns]
        lines.append(f"| {name} | {len(members)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    digits = (
        max(0, 2 - math.floor(math.log10(abs(statistics.fmean(known)) or 1.0))) if statistics.fmean(known) < 1 else 2
    )
    text = f"{statistics.fmean(known):.{digits}f}"
    return text + (f" ± {statistics.stdev(known) / len(known) ** 0.5:.{digits}f}" if len(known) > 1 else "")


def plot(results: list[Result], file: Path) -> None:
    """Score against seconds a picture, a point a row with standard errors over seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(11, 6))
    colours = pyplot.get_cmap("tab20").colors
    for k, name in enumerate(dict.fromkeys(result.row for result in results)):
        members = [result for result in results if result.row == name]
        scores = [result.score_overall for result in members]
        seconds = statistics.fmean(result.seconds_per_image for result in members)
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        is_student = members[0].guidance_residual is not None
        fmt = "o" if is_student else "s"
        colour = colours[k % len(colours)]
        axes.errorbar(seconds, statistics.fmean(scores), error, fmt=fmt, color=colour, capsize=3, label=name)
    axes.set(
        xscale="log", xlabel="seconds a picture", ylabel="score", title="students (circles) and teachers (squares)"
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, required=True, help="folder for targets, students and pictures")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="default docs/results")
    parser.add_argument("--rows", default=".", help="regular expression that a row's name must match (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="default 3")
    parser.add_argument("--num-steps", type=int, default=50, help="of teachers and students (default 50)")
    parser.add_argument("--guidance-scale", type=float, default=4.0, help="default 4")
    parser.add_argument("--trajectories", type=int, default=512, help="of a target set (default 512)")
    parser.add_argument("--steps", type=int, default=600, help="of training (default 600)")
    parser.add_argument("--prompts-per-style", type=int, default=80, help="default 80")
    parser.add_argument(
        "--untimed", action="store_true", help="make and score the rows, and leave the tables for later"
    )
    parser.add_argument("--found", action="store_true", help="make the tables of what WORK already holds")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    chosen = [row for row in rows(options.num_steps, options.guidance_scale) if re.search(options.rows, row.name)]
    if not chosen:
        parser.error(f"no row matches {options.rows!r}")
    from teefusion.logs import setup_logging

    setup_logging()
    # Seed by seed, so that a run that is stopped early has whole tables.
    asked = [(row, seed) for seed in range(options.seeds) for row in chosen]
    found = [(row, seed, result) for row, seed in asked if (result := measured(row, seed, options))]
    if options.untimed:
        return
    results = [replace(result, seconds_per_image=take_time(row, seed, options)) for row, seed, result in found]
    results.sort(key=lambda result: [row.name for row in chosen].index(result.row))
    options.output.mkdir(parents=True, exist_ok=True)
    with (options.output / "method.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [item.name for item in fields(Result)])
        writer.writeheader()
        writer.writerows(asdict(result) for result in results)
    (options.output / "method.md").write_text(table(results))
    plot(results, options.output / "method.png")
    text = json.dumps({"results": [asdict(result) for result in results]}) + "\n" if options.json else table(results)
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
