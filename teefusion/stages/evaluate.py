"""Evaluation: pictures of teacher and student, their scores, the gate's verdict, the report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from teefusion.files import content_key, read_json, write_bytes, write_json
from teefusion.gate import Evidence, decide
from teefusion.group_means import BenchmarkScore, benchmark_score
from teefusion.scorer_sources import ScorerSource, scorer_of
from teefusion.settings import Settings
from teefusion.workspace import StageResult, Workspace, require

if TYPE_CHECKING:
    from teefusion.evaluation import Sampler
    from teefusion.gate import Verdict
    from teefusion.prompts import Prompt

RESULT = "evaluation.json"


def evaluation_folder(settings: Settings, prompts: Path, student: Path, scorer: ScorerSource | None = None) -> Path:
    """Where the comparison of these settings and this student lies, made or not.

    ``scorer`` is the one of these settings, where it has been found already. Raises ScorerError, StorageError.
    """
    key = content_key(
        {
            "student": student.parent.name,
            "teacher": settings.teacher.content(),
            "strategy": settings.strategy.content(),
            "prompts": prompts.name,
            "evaluate": settings.evaluate.content(),
            "scorer": (scorer or scorer_of(settings)).identity(),  # other weights at the same place are another scorer
            "gate": settings.gate.content(),
        }
    )
    return Workspace(settings).folder("evaluations", key)


def evaluate(settings: Settings, prompts: Path, student: Path) -> StageResult:
    """Compare a student folder with its teacher. Raises StudentError, ScorerError, TeacherError, StorageError."""
    workspace = Workspace(settings)
    training = read_json(require(student.parent / "training.json", command="teefusion train", what="trained student"))
    scorer = scorer_of(settings)
    output = evaluation_folder(settings, prompts, student, scorer)

    def work() -> tuple[dict[str, Any], bool]:
        reused = (output / RESULT).exists()
        if not reused:
            _compare(settings, prompts, student, training, scorer, output)
        result = read_json(output / RESULT)
        keys = ("scores", "benchmark", "nfe", "seconds_per_image", "gate", "guidance_residual", "scorer")
        return {name: result[name] for name in keys} | {"evaluation": output.name}, reused

    return workspace.stage("evaluate", output, work)


def _compare(
    settings: Settings, prompts: Path, student: Path, training: dict[str, Any], source: ScorerSource, output: Path
) -> None:
    """Make pictures, score them, decide; ``evaluation.json`` is written last."""
    from teefusion.comparison import open_comparison
    from teefusion.launch import run_scoring

    run_scoring(settings, prompts=prompts, student=student, output=output)
    compared = open_comparison(settings, prompts, student, output, source)
    rows, chosen = compared.rows, list(compared.prompts)
    scores = compared.score()
    styles = tuple(prompt.style for prompt in chosen)
    texts = tuple(prompt.text for prompt in chosen)
    verdict = decide(
        Evidence(
            styles=styles,
            teacher_prompts=texts,
            student_prompts=texts,
            teacher_scores=tuple(scores["teacher"]),
            student_scores=tuple(scores["student"]),
            nfe_teacher=rows["teacher"].nfe,
            nfe_student=rows["student"].nfe,
            guidance_residual=training["guidance_residual"],
        ),
        settings.gate,
    )
    result = {
        "scores": {row: _by_style(values, chosen) for row, values in scores.items()},
        "benchmark": {row: _benchmark(values, chosen) for row, values in scores.items()},
        "per_prompt": [
            {"prompt": prompt.text, "style": prompt.style} | {row: scores[row][k] for row in rows}
            for k, prompt in enumerate(chosen)
        ],
        "nfe": {row: rows[row].nfe for row in rows},
        "seconds_per_image": {row: rows[row].timing() for row in rows},
        "guidance_residual": training["guidance_residual"],
        "gate": verdict.to_dict(),
        "scorer": compared.scorer.describe(),
        "training": training,
    }
    write_bytes(output / "report.html", _report(settings, rows, chosen, verdict, result).encode())
    write_json(output / RESULT, result)
    compared.forget_claims()


def _by_style(values: list[float], prompts: list[Prompt]) -> dict[str, dict[str, float]]:
    """Mean, standard error and count, overall and by style."""
    return {name: _mean(group) for name, group in ({"overall": values} | _styles(values, prompts)).items()}


def _benchmark(values: list[float], prompts: list[Prompt]) -> dict[str, Any] | None:
    """The HPS v2 benchmark's number, where every style has whole groups."""
    score = benchmark_score(_styles(values, prompts))
    return score.to_dict() if score else None


def _styles(values: list[float], prompts: list[Prompt]) -> dict[str, list[float]]:
    """Scores of each style, in the prompts' order."""
    return {
        style: [value for value, prompt in zip(values, prompts, strict=True) if prompt.style == style]
        for style in sorted({prompt.style for prompt in prompts})
    }


def _mean(values: list[float]) -> dict[str, float]:
    from statistics import fmean, stdev

    error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return {"mean": fmean(values), "standard_error": error, "n": len(values)}


def _report(
    settings: Settings, rows: dict[str, Sampler], chosen: list[Prompt], verdict: Verdict, result: dict[str, Any]
) -> str:
    """The report as HTML; makes the pictures of the guidance sweep."""
    from datetime import UTC, datetime
    from importlib.metadata import version

    from teefusion import report
    from teefusion.evaluation import guidance_sweep

    options, training = settings.evaluate, result["training"]
    # Prompts from all styles: every n-th of the chosen ones.
    shown = chosen[:: max(1, len(chosen) // options.sweep_prompts)][: options.sweep_prompts]
    sweep = guidance_sweep({row: rows[row] for row in ("teacher", "student")}, shown, options.sweep)
    unguided = guidance_sweep({"unguided": rows["unguided"]}, shown, (1.0,))["unguided"][1.0]
    data = report.ReportData(
        run_key=settings.run_key,
        teacher=settings.teacher.name,
        strategy=settings.strategy.name,
        num_steps=options.num_steps or settings.strategy.num_steps,
        guidance_scale=options.guidance_scale,
        scorer=result["scorer"]["name"],
        scorer_details=result["scorer"],
        benchmark={row: BenchmarkScore.from_dict(score) for row, score in result["benchmark"].items() if score},
        verdict=verdict,
        scores={
            row: {style: report.Score(**value) for style, value in by_style.items()}
            for row, by_style in result["scores"].items()
        },
        nfe=result["nfe"],
        seconds_per_image={row: report.Timing(**timing) for row, timing in result["seconds_per_image"].items()},
        guidance_residual=training["guidance_residual"],
        residual_curve=[(step, value) for step, value in training["residual_curve"]],
        residual_by_guidance=[report.ResidualBucket(**bucket) for bucket in training["residual_by_guidance"]],
        loss_curve=[(step, value) for step, value in training["loss_curve"]],
        pictures=[
            report.PictureSet(
                prompt=prompt.text,
                style=prompt.style,
                unguided=unguided[k],
                teacher={scale: pictures[k] for scale, pictures in sweep["teacher"].items()},
                student={scale: pictures[k] for scale, pictures in sweep["student"].items()},
            )
            for k, prompt in enumerate(shown)
        ],
        stages=[
            report.StageTime(name, record["seconds"], record["reused"])
            for name, record in Workspace(settings).records().items()
        ],
        settings=settings.content(),
        versions={name: version(name) for name in ("teefusion", "torch", "diffusers", "transformers", "accelerate")},
        digests={
            "teacher": settings.teacher.revision or "",
            "prompts": settings.prompts.sha256 or "",
            "scorer": result["scorer"]["weights_sha256"],
        },
        model_name=settings.model_name,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    return report.render_report(data)
