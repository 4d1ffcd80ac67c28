"""Evaluation: pictures of teacher, student and champion, their scores, the gate's verdict, the report."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teefusion.files import content_key, read_json, write_bytes, write_json
from teefusion.gate import Evidence, decide
from teefusion.registry import TrustedModel, find_champion
from teefusion.registry.packaging import digest_of
from teefusion.scorer_sources import ScorerSource, scorer_of
from teefusion.settings import Settings
from teefusion.sources import require_fitting_scorer
from teefusion.student_index import read_index
from teefusion.workspace import StageResult, Workspace, require

if TYPE_CHECKING:
    from teefusion.comparison import Comparison
    from teefusion.gate import Verdict

log = logging.getLogger(__name__)
RESULT = "evaluation.json"
_DIVERSE = ("unguided", "teacher", "student")  # guidance makes pictures alike: the first shows how much
_DETAILS = (
    *("scores", "benchmark", "nfe", "seconds_per_image", "memory", "diversity", "guidance_control"),
    *("gate", "guidance_residual", "scorer", "champion"),
)


@dataclass(frozen=True)
class Judges:
    """What a student is scored by, and what it is held against beside its teacher."""

    scorer: ScorerSource
    champion: TrustedModel | None

    @classmethod
    def of(cls, settings: Settings, student: Path) -> Judges:
        """Raises ScorerError, StorageError, and what ``find_champion`` raises."""
        champion = find_champion(settings)
        if champion is not None and champion.digest == digest_of(student):
            log.info("the champion, version %s, is this student: it is not compared with itself", champion.version)
            champion = None
        return cls(scorer_of(settings), champion)


def evaluation_folder(settings: Settings, prompts: Path, student: Path, judges: Judges | None = None) -> Path:
    """Where the comparison of these settings and this student lies, made or not.

    ``judges`` are those of these settings, where they have been found already. Raises what ``Judges.of`` raises.
    """
    judges = judges or Judges.of(settings, student)
    determining = {
        "student": student.parent.name,
        "teacher": settings.teacher.content(),
        "strategy": settings.strategy.content(),
        "prompts": prompts.name,
        "evaluate": settings.evaluate.content(),
        "scorer": judges.scorer.identity(),  # other weights at the same place are another scorer
        "gate": settings.gate.content(),
        "champion": judges.champion and judges.champion.digest,
    }
    return Workspace(settings).folder("evaluations", content_key(determining))


def evaluate(settings: Settings, prompts: Path, student: Path) -> StageResult:
    """Compare a student folder with its teacher, and with the champion where there is one.

    Raises StudentError, ScorerError, TeacherError, StorageError, SettingsError for a toy scorer of a real teacher, and
    RegistryError for a champion that cannot be trusted.
    """
    require_fitting_scorer(settings)
    workspace = Workspace(settings)
    read_index(student)
    training = read_json(require(student.parent / "training.json", command="teefusion train", what="trained student"))
    judges = Judges.of(settings, student)
    output = evaluation_folder(settings, prompts, student, judges)

    def work() -> tuple[dict[str, Any], bool]:
        reused = (output / RESULT).exists()
        if not reused:
            _compare(settings, prompts, student, training, judges, output)
        result = read_json(output / RESULT)
        return {name: result[name] for name in _DETAILS} | {"evaluation": output.name}, reused

    return workspace.stage("evaluate", output, work)


def _compare(
    settings: Settings, prompts: Path, student: Path, training: dict[str, Any], judges: Judges, output: Path
) -> None:
    """Make pictures, score them, decide; ``evaluation.json`` is written last."""
    from teefusion.comparison import open_comparison
    from teefusion.launch import run_scoring
    from teefusion.report import render_report
    from teefusion.report.assemble import evaluation_report

    champion = judges.champion.folder if judges.champion else None
    paths = {"prompts": prompts, "student": student, "output": output} | ({"champion": champion} if champion else {})
    run_scoring(settings, "teefusion.comparison", paths)
    compared = open_comparison(settings, prompts, student, output, champion=champion, source=judges.scorer)
    scores = compared.score()
    result, sweep = compared.measured(scores), compared.sweep(("teacher", "student"))
    result |= {
        "diversity": {row: asdict(mean) for row, mean in compared.diversity(_DIVERSE).items()},
        "guidance_control": {row: [point.to_dict() for point in points] for row, points in sweep.items()},
        "guidance_residual": training["guidance_residual"],
        "champion": _named(judges.champion),
        "training": training,
    }
    verdict = _verdict(settings, compared, scores, result)
    result["gate"] = verdict.to_dict()
    write_bytes(output / "report.html", render_report(evaluation_report(compared, result, verdict, sweep)).encode())
    write_json(output / RESULT, result)
    compared.forget_claims()


def _named(champion: TrustedModel | None) -> dict[str, Any] | None:
    return None if champion is None else {"name": champion.name, "version": champion.version, "digest": champion.digest}


def _verdict(
    settings: Settings, compared: Comparison, scores: dict[str, list[float]], result: dict[str, Any]
) -> Verdict:
    texts = tuple(prompt.text for prompt in compared.prompts)
    seconds = {row: result["seconds_per_image"][row]["median"] for row in ("teacher", "student")}
    evidence = Evidence(
        styles=tuple(prompt.style for prompt in compared.prompts),
        teacher_prompts=texts,
        student_prompts=texts,
        teacher_scores=tuple(scores["teacher"]),
        student_scores=tuple(scores["student"]),
        nfe_teacher=result["nfe"]["teacher"],
        nfe_student=result["nfe"]["student"],
        seconds_teacher=seconds["teacher"],
        seconds_student=seconds["student"],
        diversity_teacher=result["diversity"]["teacher"]["mean"],
        diversity_student=result["diversity"]["student"]["mean"],
        guidance_residual=result["guidance_residual"],
        champion_prompts=texts if "champion" in scores else None,
        champion_scores=tuple(scores["champion"]) if "champion" in scores else None,
    )
    return decide(evidence, settings.gate)
