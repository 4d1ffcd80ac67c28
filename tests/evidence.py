"""What the gate is shown in its tests: a student that passes, and what is changed of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from teefusion.gate import Evidence, Verdict
from teefusion.settings import GateSettings

RULES = GateSettings(margin=0.0125, style_margin=0.05, min_prompts=4, resamples=1000)
STYLES = ("anime", "photo")


def evidence(
    teacher: Sequence[float] | None = None, student: Sequence[float] | None = None, **changes: object
) -> Evidence:
    """A student that passes RULES: eight prompts in two styles, all at 20, half the forwards, residual 0.25."""
    teacher = [20.0] * 8 if teacher is None else teacher
    student = list(teacher) if student is None else student
    prompts = tuple(f"prompt {k}" for k in range(len(teacher)))
    base = Evidence(
        styles=tuple(STYLES[k * 2 // len(teacher)] for k in range(len(teacher))),
        teacher_prompts=prompts,
        student_prompts=prompts,
        teacher_scores=tuple(teacher),
        student_scores=tuple(student),
        nfe_teacher=56.0,
        nfe_student=28.0,
        seconds_teacher=0.5,
        seconds_student=0.25,
        diversity_teacher=0.4,
        diversity_student=0.4,
        guidance_residual=0.25,
    )
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def rejected(verdict: Verdict, text: str) -> bool:
    return not verdict.passed and any(text in reason for reason in verdict.reasons)
