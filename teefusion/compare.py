"""Any models side by side: students, teachers, registered versions; the evaluation's measurements, and no verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import torch

from teefusion.comparison import Comparison
from teefusion.devices import resolve_device
from teefusion.errors import UsageError
from teefusion.evaluation import choose_prompts
from teefusion.files import content_key, read_json, sha256_folder, write_bytes, write_json
from teefusion.gate import difference_intervals
from teefusion.group_means import OVERALL
from teefusion.prompts import load_prompt_set
from teefusion.registry import SCHEME, resolve
from teefusion.report import COLORS, Pairing, ReportData, render_report
from teefusion.report.assemble import control, now, pictures, row, swept, versions
from teefusion.samplers import Sampler, student_sampler, teacher_sampler
from teefusion.scorer_sources import scorer_of
from teefusion.scoring import load_scorer
from teefusion.settings import Settings, TeacherSettings, load_settings
from teefusion.sources import require_fitting_scorer, revision_of
from teefusion.stages.ingest import ingest
from teefusion.students import is_student, load_student
from teefusion.teachers import load_teacher
from teefusion.workspace import Workspace

if TYPE_CHECKING:
    from teefusion.intervals import Interval

RESULT = "comparison.json"


@dataclass(frozen=True)
class Model:
    """One of what is compared, found and not yet loaded."""

    title: str
    digest: str
    """What its pictures follow from: of a student its folder's digest, of a teacher its revision."""
    student: Path | None = None
    teacher: TeacherSettings | None = None
    num_steps: int = 0
    """Of one that has no number of its own."""


def compare(settings: Settings, names: Sequence[str]) -> dict[str, Any]:
    """Draw, score and report; the first model is what the others are held against. All are loaded at once.

    Raises UsageError for less than two, StudentError, TeacherError, ScorerError, IntegrityError, TrackingError.
    """
    if not 2 <= len(names) <= len(COLORS):
        raise UsageError(f"{len(names)} models were named: compare two or more, at most {len(COLORS)}.")
    models = {letter: find_model(settings, name, letter) for letter, name in zip(ascii_uppercase, names, strict=False)}
    for model in models.values():
        require_fitting_scorer(settings, of=model.teacher)
    prompts, scorer = Path(ingest(settings).output), scorer_of(settings)
    determining = {
        "models": [[model.title, model.digest, model.num_steps] for model in models.values()],
        "prompts": prompts.name,
        "evaluate": settings.evaluate.content(),
        "scorer": scorer.identity(),
        "gate": settings.gate.content(),
    }
    key = content_key(determining)
    output = Workspace(settings).folder("comparisons", key)
    if not (output / RESULT).exists():
        device = resolve_device(settings.device)
        chosen = choose_prompts(load_prompt_set(prompts).heldout, settings.evaluate)
        rows = {letter: _sampler(settings, model, device) for letter, model in models.items()}
        compared = Comparison(settings, rows, load_scorer(scorer, device=device), chosen, output)
        _measure(compared, models, key)
    result: dict[str, Any] = read_json(output / RESULT)
    return result | {"report": str(output / "report.html")}


def find_model(settings: Settings, name: str, letter: str) -> Model:
    """What a name stands for. Raises UsageError, StudentError, TeacherError, RegistryError, TrackingError."""
    steps = settings.evaluate.num_steps
    if name.startswith(SCHEME):
        version = resolve(name, settings)
        assert version.digest is not None, "a registered one has a digest"
        title = f"{letter}: {version.name} {version.version}"
        return Model(title, version.digest, student=version.folder, num_steps=steps or settings.strategy.num_steps)
    folder = Path(name).expanduser()
    if is_student(folder):
        known = folder.resolve()
        title = known.parent.name if known.name == "student" else known.name  # students/KEY/student
        digest = sha256_folder(folder)
        return Model(f"{letter}: {title}", digest, student=folder, num_steps=steps or settings.strategy.num_steps)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise UsageError(
            f"{folder} is neither a student nor a teacher: model_index.json is missing. Give a diffusers folder, as "
            "the one that 'teefusion train' reported."
        )
    own = name in (settings.teacher.name, settings.teacher.uri)
    found = settings if own else load_settings(overrides={"teacher.name": name})
    revision = revision_of(found.teacher)
    teacher = found.teacher.model_copy(update={"revision": revision})
    title = folder.name if folder.is_dir() else name
    return Model(f"{letter}: {title}", revision, teacher=teacher, num_steps=steps or found.strategy.num_steps)


def _sampler(settings: Settings, model: Model, device: str) -> Sampler:
    """A student at its own guidance, a teacher by plain CFG; both at the comparison's s, in their own size."""
    if model.teacher is not None:
        teacher = load_teacher(model.teacher, device=device)
        return teacher_sampler(teacher, settings.evaluate, model.num_steps)
    assert model.student is not None, "a model is one or the other"
    dtype = getattr(torch, settings.teacher.dtype)
    return student_sampler(load_student(model.student, device=device, dtype=dtype), settings.evaluate, model.num_steps)


def _measure(compared: Comparison, models: Mapping[str, Model], key: str) -> None:
    """Everything measured into the folder; the record comes last."""
    scores = compared.score()
    sweep = compared.sweep(tuple(models))
    first, *others = models
    styles = [prompt.style for prompt in compared.prompts]
    intervals = {
        letter: difference_intervals(scores[first], scores[letter], styles, compared.settings.gate) for letter in others
    }
    result = compared.measured(scores) | {
        "models": {letter: {"title": model.title, "digest": model.digest} for letter, model in models.items()},
        "reference": first,
        "diversity": {letter: asdict(mean) for letter, mean in compared.diversity(tuple(models)).items()},
        "guidance_control": {letter: [point.to_dict() for point in points] for letter, points in sweep.items()},
        "intervals": {
            letter: {style: asdict(found) for style, found in by_style.items()}
            for letter, by_style in intervals.items()
        },
    }
    data = _report(compared, models, key, result, intervals)
    data = replace(data, control=control(sweep), swept=swept(sweep, compared))
    write_bytes(compared.output / "report.html", render_report(data).encode())
    write_json(compared.output / RESULT, result)
    compared.forget_claims()


def _report(
    compared: Comparison,
    models: Mapping[str, Model],
    key: str,
    result: Mapping[str, Any],
    intervals: Mapping[str, Mapping[str, Interval]],
) -> ReportData:
    settings, first = compared.settings, next(iter(models.values())).title
    colors = dict(zip(models, COLORS, strict=False))
    about = (
        f"Same prompts, same seeds, guidance scale s = {settings.evaluate.guidance_scale:g}; each in its own size and "
        f"number of steps, teachers with plain classifier-free guidance. Scored by {result['scorer']['name']}. The "
        "prompts are held out by these settings; whether each model was trained without them is not known here."
    )
    return ReportData(
        key=key,
        scorer=result["scorer"]["name"],
        about=about,
        rows={letter: row(result, letter, model.title, colors[letter]) for letter, model in models.items()},
        pairings=[Pairing(f"{models[letter].title} minus {first}", found) for letter, found in intervals.items()],
        memory_kind=result["memory"]["kind"],
        scorer_details=result["scorer"],
        pictures=pictures(compared),
        settings={"evaluate": settings.evaluate.content(), "prompts": settings.prompts.content()},
        versions=versions(),
        digests={model.title: model.digest for model in models.values()},
        created=now(),
    )


def table(result: Mapping[str, Any]) -> str:
    """The comparison as a person reads it in a terminal."""
    scores, titles = result["scores"], {letter: model["title"] for letter, model in result["models"].items()}
    names = [OVERALL, *sorted(set(next(iter(scores.values()))) - {OVERALL})]
    width = max(len(title) for title in titles.values())
    lines = [
        f"  {'score':<{width}}" + "".join(f"{name:>14}" for name in names) + f"{'forwards':>12}{'s a picture':>13}"
    ]
    for letter, title in titles.items():
        means = "".join(f"{scores[letter][name]['mean']:>14.2f}" for name in names)
        seconds = result["seconds_per_image"][letter]["median"]
        lines.append(f"  {title:<{width}}{means}{result['nfe'][letter]:>12g}{seconds:>13.3f}")
    for letter, found in result["intervals"].items():
        overall = found[OVERALL]
        lines.append(
            f"  {titles[letter]} minus {titles[result['reference']]}: {overall['difference']:+.2f}, "
            f"{overall['low']:+.2f} to {overall['high']:+.2f}"
        )
    return "\n".join([*lines, f"  report  {result['report']}"])
