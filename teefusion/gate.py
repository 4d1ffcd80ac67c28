"""Whether a student may be registered as challenger: scores in, decision with reasons out. Pure, no I/O.

For all prompts together and for each style, the lower bound of a paired bootstrap interval of ``mean(student -
teacher)`` must be at least ``-margin * |teacher mean|``. What was not measured never passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from teefusion.settings import GateSettings

OVERALL = "overall"
# Beyond any scorer's range, and small enough that no mean overflows: an infinite teacher mean would allow anything.
_LARGEST_VALUE = 1e9
_CHUNK_VALUES = 1 << 20  # resampled scores held at once; 3,200 prompts x 10,000 resamples would be 256 MB


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
    guidance_residual: float
    """On held-out states; 1 is a student that learned no guidance, 0 a perfect one."""


@dataclass(frozen=True)
class Interval:
    """Student minus teacher over n prompts, in score points. It passes when ``low >= -margin``."""

    n: int
    teacher_mean: float
    student_mean: float
    difference: float
    low: float
    high: float
    margin: float
    """Points the lower bound may be below zero: the setting's share of ``|teacher_mean|``."""

    @property
    def passed(self) -> bool:
        """False for NaN."""
        return self.low >= -self.margin


@dataclass(frozen=True)
class Verdict:
    """The decision, why, and the intervals it rests on: ``overall`` first, then the styles in order."""

    passed: bool
    reasons: tuple[str, ...]
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    """Empty when the scores cannot be compared at all."""
    confidence: float = 0.95

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; holds no NaN."""
        return {
            "passed": self.passed,
            "reasons": list(self.reasons),
            "intervals": {name: asdict(interval) for name, interval in self.intervals.items()},
            "confidence": self.confidence,
        }


def decide(evidence: Evidence, settings: GateSettings) -> Verdict:
    """Pass a student that is not below its teacher by more than the margins, at fewer forwards, with guidance learned.

    Pure: the same evidence and settings give the same verdict, in any order of the prompts. When it fails the reasons
    are what failed, when it passes they are what was found.
    """
    defects = list(_score_defects(evidence))
    intervals = {} if defects else _intervals(evidence, settings)
    failures = [
        *defects,
        *_interval_failures(intervals, settings),
        *_nfe_failures(evidence, settings),
        *_residual_failures(evidence, settings),
    ]
    reasons = failures or _reasons_to_pass(evidence, intervals, settings)
    return Verdict(passed=not failures, reasons=tuple(reasons), intervals=intervals, confidence=settings.confidence)


def _score_defects(evidence: Evidence) -> Iterator[str]:
    """Why the scores cannot be compared."""
    prompts = len(evidence.teacher_prompts)
    if not prompts:
        yield "Nothing was measured: there is no prompt with a score. Evaluate on held-out prompts first."
        return
    counts = {
        "styles": len(evidence.styles),
        "teacher scores": len(evidence.teacher_scores),
        "student prompts": len(evidence.student_prompts),
        "student scores": len(evidence.student_scores),
    }
    if wrong := [f"{count} {name}" for name, count in counts.items() if count != prompts]:
        yield f"Scores are missing: there are {prompts} teacher prompts, but {', '.join(wrong)}. Evaluate again."
        return
    yield from _prompt_defects(evidence)
    if OVERALL in evidence.styles:
        yield f"A style is called {OVERALL!r}, which is the name for all prompts together. Rename the style."
    for row, scores in (("teacher", evidence.teacher_scores), ("student", evidence.student_scores)):
        if unusable := sum(not _is_usable(score) for score in scores):
            yield f"{unusable} of {prompts} {row} scores are no usable numbers (NaN or infinite). Look at the pictures."


def _prompt_defects(evidence: Evidence) -> Iterator[str]:
    teacher, student = Counter(evidence.teacher_prompts), Counter(evidence.student_prompts)
    if repeated := [prompt for prompt, count in (teacher | student).items() if count > 1]:
        yield (
            f"{len(repeated)} prompts come more than once, the first is {_shortened(repeated[0])}: it is unclear which "
            "scores belong together. Give each measurement a name of its own."
        )
    if teacher.keys() != student.keys():
        yield (
            "Teacher and student were scored on different prompts: "
            f"{len(teacher.keys() - student.keys())} only for the teacher, "
            f"{len(student.keys() - teacher.keys())} only for the student. Evaluate both on the same prompts."
        )


def _intervals(evidence: Evidence, settings: GateSettings) -> dict[str, Interval]:
    student_score = dict(zip(evidence.student_prompts, evidence.student_scores, strict=True))
    # Sorted, because a resample draws positions: the verdict must not depend on the order in which prompts were scored.
    pairs = sorted(
        (prompt, style, score, student_score[prompt])
        for prompt, style, score in zip(evidence.teacher_prompts, evidence.styles, evidence.teacher_scores, strict=True)
    )
    groups = {OVERALL: (pairs, settings.margin)}
    for style in sorted(set(evidence.styles)):
        groups[style] = ([pair for pair in pairs if pair[1] == style], settings.style_margin)
    return {
        name: _interval([pair[2] for pair in group], [pair[3] for pair in group], share, settings)
        for name, (group, share) in groups.items()
    }


def _interval(teacher: list[float], student: list[float], share: float, settings: GateSettings) -> Interval:
    """Percentile interval over resampled pairs; its ends are resampled means, the outer ones where it falls between."""
    teacher_N, student_N = np.asarray(teacher, dtype=np.float64), np.asarray(student, dtype=np.float64)
    difference_N = student_N - teacher_N
    means_R = _resampled_means(difference_N, resamples=settings.resamples, seed=settings.seed)
    tail = (1 - settings.confidence) / 2
    return Interval(
        n=len(teacher),
        teacher_mean=float(teacher_N.mean()),
        student_mean=float(student_N.mean()),
        difference=float(difference_N.mean()),
        low=float(np.quantile(means_R, tail, method="lower")),
        high=float(np.quantile(means_R, 1 - tail, method="higher")),
        margin=share * abs(float(teacher_N.mean())),
    )


def _resampled_means(values_N: NDArray[np.float64], *, resamples: int, seed: int) -> NDArray[np.float64]:
    """Means of ``resamples`` draws of N values with replacement, in chunks that bound memory."""
    generator = np.random.default_rng(seed)
    n = len(values_N)
    chunk = max(1, _CHUNK_VALUES // n)
    means_R = np.empty(resamples)
    for start in range(0, resamples, chunk):
        count = min(chunk, resamples - start)
        means_R[start : start + count] = values_N[generator.integers(n, size=(count, n))].mean(axis=1)
    return means_R


def _interval_failures(intervals: Mapping[str, Interval], settings: GateSettings) -> Iterator[str]:
    for name, interval in intervals.items():
        where = _where(name)
        if name != OVERALL and interval.n < settings.min_prompts:
            yield f"{where}: not enough evidence, {interval.n} prompts where {settings.min_prompts} are needed."
        if not interval.passed:
            yield (
                f"{where}: the student may score {-interval.low:.4g} below its teacher (lower bound of the "
                f"{settings.confidence * 100:g} % interval over {interval.n} prompts, mean difference "
                f"{_signed(interval.difference)}); {interval.margin:.4g} is allowed."
            )


def _nfe_failures(evidence: Evidence, settings: GateSettings) -> Iterator[str]:
    teacher, student = evidence.nfe_teacher, evidence.nfe_student
    if not (_is_usable(teacher) and _is_usable(student) and teacher > 0 and student > 0):
        yield f"Forwards a picture were not measured: teacher {teacher:g}, student {student:g}. Evaluate again."
    elif not student / teacher <= settings.max_nfe_ratio:
        yield (
            f"The student needs {student:g} forwards a picture and its teacher {teacher:g}: that is "
            f"{student / teacher:.4g} of the teacher's, at most {settings.max_nfe_ratio:g} is allowed."
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


def _reasons_to_pass(evidence: Evidence, intervals: Mapping[str, Interval], settings: GateSettings) -> list[str]:
    overall = intervals[OVERALL]
    styles = {name: interval for name, interval in intervals.items() if name != OVERALL}
    closest = min(styles, key=lambda name: styles[name].low + styles[name].margin)
    percent = f"{settings.confidence * 100:g} %"
    return [
        f"Overall the student scores {overall.student_mean:.4g} and its teacher {overall.teacher_mean:.4g} on the same "
        f"{overall.n} prompts: a difference of {_signed(overall.difference)}, {percent} interval "
        f"{_signed(overall.low)} to {_signed(overall.high)}; a lower bound of {_signed(-overall.margin)} is allowed.",
        f"No style falls behind: the closest to its limit is {closest}, with a lower bound of "
        f"{_signed(styles[closest].low)} where {_signed(-styles[closest].margin)} is allowed.",
        f"It needs {evidence.nfe_student:g} forwards a picture where its teacher needs {evidence.nfe_teacher:g}.",
        f"It learned to follow the guidance scale: its guidance residual is {evidence.guidance_residual:.4g} (1 is "
        f"none learned, 0 is perfect), at most {settings.max_guidance_residual:g} is allowed.",
    ]


def _is_usable(value: float) -> bool:
    """False for NaN, infinities and what no scorer gives."""
    return abs(value) <= _LARGEST_VALUE


def _where(name: str) -> str:
    return "Overall" if name == OVERALL else f"Style {name}"


def _signed(value: float) -> str:
    return f"{value + 0.0:+.3g}"  # adding zero turns -0 into +0


def _shortened(prompt: str, length: int = 60) -> str:
    return repr(prompt if len(prompt) <= length else prompt[: length - 3] + "...")
