"""Whether a student may be registered as challenger: scores in, decision with reasons out. Pure, no I/O.

For all prompts together and for each style, the lower bound of a paired bootstrap interval of ``mean(student -
reference)`` must be at least ``-margin * |reference mean|``, with the teacher as reference, and the champion where
there is one. What was not measured never passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from teefusion.group_means import OVERALL, by_style
from teefusion.intervals import Interval, paired_interval
from teefusion.settings import GateSettings

Outcome = Literal["passed", "failed", "not enough evidence"]
# Beyond any scorer's range, and small enough that no mean overflows: an infinite teacher mean would allow anything.
_LARGEST_VALUE = 1e9


@dataclass(frozen=True)
class Evidence:
    """What was measured. Scores are paired by prompt; ``styles`` belong to ``teacher_prompts``.

    Prompts are any text that names one measurement (prompt, or prompt and seed), so none may come twice.
    """

    styles: Sequence[str]
    teacher_prompts: Sequence[str]
    student_prompts: Sequence[str]
    teacher_scores: Sequence[float]
    student_scores: Sequence[float]
    nfe_teacher: float
    """Transformer forwards a picture."""
    nfe_student: float
    seconds_teacher: float
    """A picture."""
    seconds_student: float
    diversity_teacher: float
    """Mean distance of a prompt's pictures from several seeds."""
    diversity_student: float
    guidance_residual: float
    """On held-out states; 1 is a student that learned no guidance, 0 a perfect one."""
    champion_prompts: Sequence[str] | None = None
    """None, as its scores, where there is no champion."""
    champion_scores: Sequence[float] | None = None


@dataclass(frozen=True)
class Verdict:
    """The decision, why, and the intervals it rests on: ``overall`` first, then the styles in order.

    ``not enough evidence`` is a student that may well be good enough, of which too few prompts were scored to tell.
    """

    outcome: Outcome
    reasons: tuple[str, ...]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Against the teacher; empty when the scores cannot be compared at all."""
    champion_intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Against the champion, where there is one."""
    confidence: float = 0.95

    @property
    def passed(self) -> bool:
        """Whether the student may be registered."""
        return self.outcome == "passed"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; holds no NaN."""
        return {
            "passed": self.passed,
            "outcome": self.outcome,
            "reasons": list(self.reasons),
            "intervals": {name: asdict(interval) for name, interval in self.intervals.items()},
            "champion_intervals": {name: asdict(interval) for name, interval in self.champion_intervals.items()},
            "confidence": self.confidence,
        }


@dataclass(frozen=True)
class _Finding:
    """Why a student does not pass."""

    reason: str
    undecided: bool = False
    """More prompts would tell."""


def decide(evidence: Evidence, settings: GateSettings) -> Verdict:
    """Pass a student that is neither below its teacher nor below the champion by more than the margins, at fewer
    forwards and seconds, as diverse, with guidance learned.

    Pure: the same evidence and settings give the same verdict, in any order of the prompts. When it does not pass the
    reasons are what stands against it, when it passes they are what was found.
    """
    defects = list(_score_defects(evidence))
    against_teacher = (
        {} if defects else _intervals(evidence, evidence.teacher_prompts, evidence.teacher_scores, settings)
    )
    against_champion = {}
    if evidence.champion_prompts is not None and evidence.champion_scores is not None and not defects:
        against_champion = _intervals(evidence, evidence.champion_prompts, evidence.champion_scores, settings)
    findings = [
        *(_Finding(defect) for defect in defects),
        *_interval_findings(against_teacher, settings, "its teacher"),
        *_interval_findings(against_champion, settings, "the champion"),
        *(
            _Finding(failure)
            for rule in (_nfe_failures, _speed_failures, _diversity_failures, _residual_failures)
            for failure in rule(evidence, settings)
        ),
    ]
    reasons = [finding.reason for finding in findings] or [
        *_reasons_to_pass(evidence, against_teacher, settings),
        *_champion_reasons(against_champion),
    ]
    return Verdict(_outcome(findings), tuple(reasons), against_teacher, against_champion, settings.confidence)


def _outcome(findings: Sequence[_Finding]) -> Outcome:
    if not findings:
        return "passed"
    return "not enough evidence" if all(finding.undecided for finding in findings) else "failed"


def _score_defects(evidence: Evidence) -> Iterator[str]:
    """Why the scores cannot be compared."""
    prompts = len(evidence.teacher_prompts)
    if not prompts:
        yield "Nothing was measured: there is no prompt with a score. Evaluate on held-out prompts first."
        return
    rows = {"teacher": evidence.teacher_scores, "student": evidence.student_scores}
    counts = {"styles": len(evidence.styles), "student prompts": len(evidence.student_prompts)}
    if evidence.champion_prompts is not None or evidence.champion_scores is not None:
        rows["champion"] = evidence.champion_scores or ()
        counts["champion prompts"] = len(evidence.champion_prompts or ())
    counts |= {f"{row} scores": len(scores) for row, scores in rows.items()}
    if wrong := [f"{count} {name}" for name, count in counts.items() if count != prompts]:
        yield f"Scores are missing: there are {prompts} teacher prompts, but {', '.join(wrong)}. Evaluate again."
        return
    yield from _prompt_defects(evidence)
    if OVERALL in evidence.styles:
        yield f"A style is called {OVERALL!r}, which is the name for all prompts together. Rename the style."
    for row, scores in rows.items():
        if unusable := sum(not _is_usable(score) for score in scores):
            yield f"{unusable} of {prompts} {row} scores are no usable numbers (NaN or infinite). Look at the pictures."


def _prompt_defects(evidence: Evidence) -> Iterator[str]:
    teacher = Counter(evidence.teacher_prompts)
    others = {"student": Counter(evidence.student_prompts)}
    if evidence.champion_prompts is not None:
        others["champion"] = Counter(evidence.champion_prompts)
    together = teacher
    for other in others.values():
        together = together | other
    if repeated := [prompt for prompt, count in together.items() if count > 1]:
        yield (
            f"{len(repeated)} prompts come more than once, the first is {_shortened(repeated[0])}: it is unclear which "
            "scores belong together. Give each measurement a name of its own."
        )
    for row, other in others.items():
        if teacher.keys() != other.keys():
            yield (
                f"Teacher and {row} were scored on different prompts: "
                f"{len(teacher.keys() - other.keys())} only for the teacher, "
                f"{len(other.keys() - teacher.keys())} only for the {row}. Evaluate both on the same prompts."
            )


def _intervals(
    evidence: Evidence, prompts: Sequence[str], scores: Sequence[float], settings: GateSettings
) -> dict[str, Interval]:
    """Student minus the reference that has these scores, overall and by style."""
    student_score = dict(zip(evidence.student_prompts, evidence.student_scores, strict=True))
    style = dict(zip(evidence.teacher_prompts, evidence.styles, strict=True))
    # Sorted, because a resample draws positions: the verdict must not depend on the order in which prompts were scored.
    pairs = sorted(
        (prompt, score, student_score[prompt], style[prompt]) for prompt, score in zip(prompts, scores, strict=True)
    )
    _, reference, student, styles = zip(*pairs, strict=True)
    return difference_intervals(reference, student, styles, settings)


def difference_intervals(
    reference: Sequence[float], student: Sequence[float], styles: Sequence[str], settings: GateSettings
) -> dict[str, Interval]:
    """Student minus reference, overall and by style, of scores paired by their place."""
    references = {OVERALL: list(reference)} | by_style(reference, styles)
    students = {OVERALL: list(student)} | by_style(student, styles)
    return {
        name: paired_interval(
            references[name],
            students[name],
            share=settings.margin if name == OVERALL else settings.style_margin,
            confidence=settings.confidence,
            resamples=settings.resamples,
            seed=settings.seed,
        )
        for name in references
    }


def _interval_findings(intervals: Mapping[str, Interval], settings: GateSettings, reference: str) -> Iterator[_Finding]:
    for name, interval in intervals.items():
        where = _where(name)
        if name != OVERALL and interval.n < settings.min_prompts:
            few = f"{interval.n} prompts where {settings.min_prompts} are needed"
            yield _Finding(f"{where}: not enough evidence, {few}.", undecided=True)
        if interval.passed:
            continue
        found = (
            f"the student may score {-interval.low:.4g} below {reference} (lower bound of the "
            f"{settings.confidence * 100:g} % interval over {interval.n} prompts, mean difference "
            f"{_signed(interval.difference)}); {interval.margin:.4g} is allowed."
        )
        if interval.worse or interval.precise or interval.margin == 0:
            yield _Finding(f"{where}: {found}")
        else:
            needed = f"About {interval.prompts_for_precision:,} prompts would tell."
            yield _Finding(f"{where}: not enough evidence, {found} {needed}", undecided=True)


def _nfe_failures(evidence: Evidence, settings: GateSettings) -> Iterator[str]:
    teacher, student = evidence.nfe_teacher, evidence.nfe_student
    if not (_is_usable(teacher) and _is_usable(student) and teacher > 0 and student > 0):
        yield f"Forwards a picture were not measured: teacher {teacher:g}, student {student:g}. Evaluate again."
    elif not student / teacher <= settings.max_nfe_ratio:
        yield (
            f"The student needs {student:g} forwards a picture and its teacher {teacher:g}: that is "
            f"{student / teacher:.4g} of the teacher's, at most {settings.max_nfe_ratio:g} is allowed."
        )


def _speed_failures(evidence: Evidence, settings: GateSettings) -> Iterator[str]:
    teacher, student = evidence.seconds_teacher, evidence.seconds_student
    if not (_is_usable(teacher) and _is_usable(student) and teacher > 0 and student > 0):
        yield f"Seconds a picture were not measured: teacher {teacher:g}, student {student:g}. Evaluate again."
    elif not teacher / student >= settings.min_speedup:
        yield (
            f"The student takes {student:.3g} s a picture and its teacher {teacher:.3g} s: that is "
            f"{teacher / student:.3g} times as fast, at least {settings.min_speedup:g} is asked for."
        )


def _diversity_failures(evidence: Evidence, settings: GateSettings) -> Iterator[str]:
    teacher, student = evidence.diversity_teacher, evidence.diversity_student
    if settings.min_diversity == 0:
        return
    if not (_is_usable(teacher) and _is_usable(student) and teacher > 0 and student >= 0):
        yield (
            f"Diversity was not measured: teacher {teacher:g}, student {student:g}. Set evaluate.diversity_prompts and "
            "diversity_seeds, and evaluate again."
        )
    elif not student / teacher >= settings.min_diversity:
        yield (
            f"The student's pictures of a prompt differ less than its teacher's: their distance is {student:.3g}, the "
            f"teacher's {teacher:.3g}, that is {student / teacher:.3g} of it; at least {settings.min_diversity:g} is "
            "asked for."
        )


def _residual_failures(evidence: Evidence, settings: GateSettings) -> Iterator[str]:
    residual = evidence.guidance_residual
    if not (_is_usable(residual) and residual >= 0):
        yield f"The guidance residual was not measured: it is {residual:g}. Train again with held-out states."
    elif not residual <= settings.max_guidance_residual:
        yield (
            f"The student learned too little guidance: its guidance residual is {residual:.4g} (1 is none learned, "
            f"0 is perfect), at most {settings.max_guidance_residual:g} is allowed."
        )


def _reasons_to_pass(evidence: Evidence, intervals: Mapping[str, Interval], settings: GateSettings) -> Iterator[str]:
    overall = intervals[OVERALL]
    closest, interval = _closest_style(intervals)
    percent = f"{settings.confidence * 100:g} %"
    yield (
        f"Overall the student scores {overall.student_mean:.4g} and its teacher {overall.reference_mean:.4g} on the "
        f"same {overall.n} prompts: a difference of {_signed(overall.difference)}, {percent} interval "
        f"{_signed(overall.low)} to {_signed(overall.high)}; a lower bound of {_signed(-overall.margin)} is allowed."
    )
    yield (
        f"No style falls behind: the closest to its limit is {closest}, with a lower bound of {_signed(interval.low)} "
        f"where {_signed(-interval.margin)} is allowed."
    )
    yield (
        f"It needs {evidence.nfe_student:g} forwards a picture where its teacher needs {evidence.nfe_teacher:g}, and "
        f"is {evidence.seconds_teacher / evidence.seconds_student:.3g} times as fast."
    )
    if settings.min_diversity:
        yield (
            f"Its pictures of a prompt differ {evidence.diversity_student / evidence.diversity_teacher:.3g} times as "
            f"much as its teacher's; at least {settings.min_diversity:g} is asked for."
        )
    yield (
        f"It learned to follow the guidance scale: its guidance residual is {evidence.guidance_residual:.4g} (1 is "
        f"none learned, 0 is perfect), at most {settings.max_guidance_residual:g} is allowed."
    )


def _champion_reasons(intervals: Mapping[str, Interval]) -> Iterator[str]:
    if intervals:
        overall, (closest, interval) = intervals[OVERALL], _closest_style(intervals)
        yield (
            f"It is not below the champion, which scores {overall.reference_mean:.4g}: the difference is "
            f"{_signed(overall.difference)}, {_signed(overall.low)} to {_signed(overall.high)}; the closest style is "
            f"{closest}, with a lower bound of {_signed(interval.low)} where {_signed(-interval.margin)} is allowed."
        )


def _closest_style(intervals: Mapping[str, Interval]) -> tuple[str, Interval]:
    """The style that is nearest to its limit."""
    styles = {name: interval for name, interval in intervals.items() if name != OVERALL}
    return min(styles.items(), key=lambda item: item[1].low + item[1].margin)


def _is_usable(value: float) -> bool:
    """False for NaN, infinities and what no scorer gives."""
    return abs(value) <= _LARGEST_VALUE


def _where(name: str) -> str:
    return "Overall" if name == OVERALL else f"Style {name}"


def _signed(value: float) -> str:
    return f"{value + 0.0:+.3g}"  # adding zero turns -0 into +0


def _shortened(prompt: str, length: int = 60) -> str:
    return repr(prompt if len(prompt) <= length else prompt[: length - 3] + "...")
