"""The paper's table on the bundled teacher: teachers, students, ablations and baselines, in one run.

    python benchmarks/method.py --workdir WORK --output docs/results [--rows REGEX] [--seeds 3] [--json]

Writes OUTPUT/method.csv (a line a row and seed), method.md (means and standard errors over seeds) and method.png.
A teacher's seed is its noise, a student's that of its training and of its noise. Seconds a picture are medians over
batches on the machine at hand, with text encoding and decoding; compare them within one run only. What a row needs is
kept in WORK and found again, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import re
import statistics
import sys
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SHARED = {
    "strategy.guidance_min": 1.0,
    "strategy.guidance_max": 7.0,
    "targets.heldout_trajectories": 64,
    "mlflow.experiment": "method",
}
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
    """The table. Plain CFG comes at the reflective teachers' effective guidance and at their price, too."""
    price = 5 * num_steps - 3  # of both reflective teachers, whose weak leg needs one branch
    teachers = [
        Row("unguided", guidance=1.0),
        Row("cfg"),
        Row("cfg_at_guidance_of_w2sd", guidance=2 * s - 1),
        Row("cfg_at_guidance_of_z_sampling", guidance=2 * s),
        Row("cfg_at_nfe_of_reflection", num_steps=round(price / 2)),
        Row("z_sampling", Z_SAMPLING),
        Row("w2sd", W2SD),
    ]
    students = [
        Row("distill_cfg_of_cfg", {"fusion.variant": "distill_cfg"}, student=True),
        Row("teefusion_of_cfg", student=True),
        Row("teefusion_of_z_sampling", Z_SAMPLING, student=True),
        Row("teefusion_of_w2sd", W2SD, student=True),
        *(
            Row(f"{variant}_of_cfg", {"fusion.variant": variant}, student=True)
            for variant in ("paper", "published", "linear", "unmodulated")
        ),
    ]
    few = [
        Row(f"teefusion_of_w2sd_{n}_steps", W2SD | {"student.num_steps": n}, student=True)
        for n in (25, 12, 8, 4)
        if n < num_steps
    ]
    return teachers + students + few


def measure(row: Row, seed: int, options: argparse.Namespace) -> Result:
    """Make what the row needs, and draw and score its pictures."""
    from teefusion.evaluation import choose_prompts, samplers, score_rows
    from teefusion.prompts import load_prompt_set
    from teefusion.scoring import load_scorer
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
    prompts = ingest(settings).output
    residual = None
    if row.student:
        made = train(settings, prompts, targets(settings, prompts).output)
        residual, folder = made.details["guidance_residual"], Path(made.details["student"])
    teacher = with_weights(load_teacher(settings.teacher, device=settings.device), settings.strategy)
    dtype = teacher.pipeline.transformer.dtype
    student = load_student(folder, device=teacher.device, dtype=dtype) if row.student else teacher.pipeline
    kind = "student" if row.student else "teacher"
    sampler = samplers(settings, teacher, student)[kind]
    chosen = choose_prompts(load_prompt_set(prompts).heldout, settings.evaluate)
    scorer = load_scorer(settings.evaluate.scorer, device=teacher.device)
    pictures = options.workdir / "rows" / f"{row.name}-{seed}"
    scores = score_rows({kind: sampler}, scorer, chosen, settings.evaluate, pictures)[kind]
    styles = {
        style: statistics.fmean(score for score, prompt in zip(scores, chosen, strict=True) if prompt.style == style)
        for style in {prompt.style for prompt in chosen}
    }
    return Result(
        row=row.name,
        seed=seed,
        score_overall=statistics.fmean(scores),
        **{f"score_{style.replace('-', '_')}": value for style, value in styles.items()},
        nfe=sampler.nfe,
        seconds_per_image=sampler.timing()["median"],
        guidance_residual=residual,
    )


def measured(row: Row, seed: int, options: argparse.Namespace) -> Result:
    """The measurement, taken or found. It is kept under what determines it."""
    from teefusion.storage import content_key, read_json, write_json

    asked = {name: value for name, value in vars(options).items() if name not in ("workdir", "output", "rows", "json")}
    asked.pop("seeds")
    file = options.workdir / "rows" / f"{content_key([asdict(row), seed, asked])}.json"
    if not file.exists():
        write_json(file, asdict(measure(row, seed, options)))
    return Result(**read_json(file))


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

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for name in dict.fromkeys(result.row for result in results):
        members = [result for result in results if result.row == name]
        scores = [result.score_overall for result in members]
        seconds = statistics.fmean(result.seconds_per_image for result in members)
        error = statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0
        is_student = members[0].guidance_residual is not None
        axes.errorbar(seconds, statistics.fmean(scores), error, fmt="o" if is_student else "s", capsize=3)
        axes.annotate(name, (seconds, statistics.fmean(scores)), xytext=(4, 4), textcoords="offset points", fontsize=7)
    axes.set(
        xscale="log", xlabel="seconds a picture", ylabel="score", title="students (circles) and teachers (squares)"
    )
    axes.grid(alpha=0.3)
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
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    chosen = [row for row in rows(options.num_steps, options.guidance_scale) if re.search(options.rows, row.name)]
    if not chosen:
        parser.error(f"no row matches {options.rows!r}")
    from teefusion.logs import setup_logging

    setup_logging()
    # Seed by seed, so that a run that is stopped early has whole tables.
    results = [measured(row, seed, options) for seed in range(options.seeds) for row in chosen]
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
