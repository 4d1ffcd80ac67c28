"""From what an evaluation measured to what its report shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from teefusion.evaluation import picture_path, spread
from teefusion.gate import Verdict
from teefusion.group_means import BenchmarkScore, Mean
from teefusion.pictures import png_bytes
from teefusion.report.data import (
    Color,
    ControlPoint,
    Pairing,
    PictureSet,
    ReportData,
    ResidualBucket,
    Row,
    SigmaBucket,
    StageTime,
    SweptPictures,
    Timing,
)
from teefusion.settings import Settings
from teefusion.workspace import Workspace

if TYPE_CHECKING:
    from teefusion.comparison import Comparison
    from teefusion.sweeps import SweepPoint

_LOOKS: dict[str, tuple[str, Color]] = {
    "unguided": ("Unguided teacher", "unguided"),
    "cfg": ("Plain CFG", "cfg"),
    "cfg_matched": ("CFG, matched guidance", "matched"),
    "teacher": ("Teacher", "teacher"),
    "student": ("Student", "student"),
    "champion": ("Champion", "champion"),
}
_SWEPT_SHOWN = 4  # prompts of the sweep whose pictures are shown


def evaluation_report(
    compared: Comparison, result: Mapping[str, Any], verdict: Verdict, sweep: Mapping[str, Sequence[SweepPoint]]
) -> ReportData:
    """``result`` is what ``evaluation.json`` will hold; pictures are read from the evaluation's folder."""
    settings, training = compared.settings, result["training"]
    pairings = [Pairing("student minus teacher", verdict.intervals)]
    if verdict.champion_intervals:
        pairings.append(Pairing("student minus champion", verdict.champion_intervals))
    return ReportData(
        key=settings.run_key,
        teacher=settings.teacher.name,
        scorer=result["scorer"]["name"],
        about=_about(settings, result),
        verdict=verdict,
        rows={name: row(result, name, *_LOOKS[name]) for name in result["scores"]},
        pairings=pairings,
        memory_kind=result["memory"]["kind"],
        guidance_residual=result["guidance_residual"],
        scorer_details=result["scorer"],
        control=control(sweep),
        residual_curve=[(step, value) for step, value in training["residual_curve"]],
        residual_by_guidance=_buckets(training["residual_by_guidance"]),
        residual_by_sigma=[
            SigmaBucket(bucket["low"], bucket["high"], _buckets(bucket["by_guidance"]))
            for bucket in training.get("residual_by_sigma_and_guidance", ())  # students of before have none
        ],
        loss_curve=[(step, value) for step, value in training["loss_curve"]],
        pictures=pictures(compared),
        swept=swept(sweep, compared),
        stages=[
            StageTime(name, record["seconds"], record["reused"])
            for name, record in Workspace(settings).records().items()
        ],
        settings=settings.content(),
        versions=versions(),
        digests=_digests(settings, result),
        model_name=settings.model_name,
        created=now(),
    )


def row(result: Mapping[str, Any], name: str, title: str, color: Color) -> Row:
    """One row of what was measured."""
    benchmark, diversity = result["benchmark"][name], result.get("diversity", {}).get(name)
    return Row(
        title=title,
        color=color,
        scores={style: Mean(**value) for style, value in result["scores"][name].items()},
        benchmark=BenchmarkScore.from_dict(benchmark) if benchmark else None,
        guidance_scale=result["guidance_scale"][name],
        nfe=result["nfe"][name],
        seconds=Timing(**result["seconds_per_image"][name]),
        peak_bytes=result["memory"]["peak_bytes"][name],
        diversity=Mean(**diversity) if diversity else None,
    )


def pictures(compared: Comparison) -> list[PictureSet]:
    """Of prompts from all styles, every row's."""
    position = {prompt: k for k, prompt in enumerate(compared.prompts)}
    return [
        PictureSet(
            prompt.text,
            prompt.style,
            {
                name: picture_path(compared.output, name, prompt, position[prompt]).read_bytes()
                for name in compared.rows
            },
        )
        for prompt in compared.spread(compared.settings.evaluate.picture_prompts)
    ]


def versions() -> dict[str, str]:
    """Of the packages that decide what is computed."""
    return {name: version(name) for name in ("teefusion", "torch", "diffusers", "transformers", "accelerate")}


def now() -> str:
    """Date and time as the report has it."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _about(settings: Settings, result: Mapping[str, Any]) -> str:
    options, nfe = settings.evaluate, result["nfe"]
    champion, cut = result["champion"], result["scorer"]["prompts_cut"]
    sentences = [
        f"The teacher {settings.teacher.name} samples with {settings.strategy.name} in "
        f"{options.num_steps or settings.strategy.num_steps} steps, {nfe['teacher']:g} forwards a picture; the student "
        f"takes {nfe['student']:g}.",
        f"Same prompts, same seeds, guidance scale s = {options.guidance_scale:g}.",
        f"Scored by {result['scorer']['name']}.",
        "Held-out prompts: none was trained on.",
    ]
    if champion:
        sentences.append(f"The champion is {champion['name']} version {champion['version']}.")
    if cut:
        sentences.append(f"{cut} prompts are longer than the scorer reads, and scored by their beginning.")
    return " ".join(sentences)


def control(sweep: Mapping[str, Sequence[SweepPoint]]) -> dict[str, list[ControlPoint]]:
    """A sweep's numbers."""
    return {
        name: [ControlPoint(point.scale, point.score, point.saturation) for point in points]
        for name, points in sweep.items()
    }


def swept(sweep: Mapping[str, Sequence[SweepPoint]], compared: Comparison) -> list[SweptPictures]:
    """A sweep's pictures, of some of its prompts."""
    prompts = compared.spread(compared.settings.evaluate.sweep_prompts)
    return [
        SweptPictures(
            prompts[k].text,
            prompts[k].style,
            {name: {point.scale: png_bytes(point.images[k]) for point in points} for name, points in sweep.items()},
        )
        for k in spread(range(len(prompts)), _SWEPT_SHOWN)
    ]


def _buckets(values: Sequence[Mapping[str, float]]) -> list[ResidualBucket]:
    return [ResidualBucket(**bucket) for bucket in values]


def _digests(settings: Settings, result: Mapping[str, Any]) -> dict[str, str]:
    found = {
        "teacher": settings.teacher.revision,
        "prompts": settings.prompts.sha256,
        "scorer": result["scorer"]["weights_sha256"],
        "champion": result["champion"] and result["champion"]["digest"],
    }
    return {name: digest for name, digest in found.items() if digest}
