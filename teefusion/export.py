"""From trained weights to a student folder that diffusers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from teefusion.fusion import Fusion, fuse
from teefusion.lora import make_trainable, merge_lora
from teefusion.settings import Settings
from teefusion.strategies import sub_grid
from teefusion.students import make_student, save_student
from teefusion.teachers import Teacher, load_teacher, load_transformer


def export_student(settings: Settings, fusion: Fusion, weights: Mapping[str, Tensor], folder: Path) -> Any:
    """Save the student with these trained float32 weights as ``folder``, loaded back to prove it; returns its pipeline.

    Raises StudentError where it does not load, TeacherError, StorageError.
    """
    transformer, _ = load_transformer(settings.teacher)
    make_trainable(fuse(transformer, fusion), settings.train.lora_rank)
    kept = transformer.load_state_dict(weights, strict=False)  # what is not trained, as the position table, stays
    missing = set(kept.missing_keys) & {name for name, weight in transformer.named_parameters() if weight.requires_grad}
    assert not missing, f"training gave no weights for {sorted(missing)}"
    assert not kept.unexpected_keys, f"training gave weights for {kept.unexpected_keys}, which are not there"
    if settings.train.lora_rank:
        merge_lora(transformer)
    options = settings.teacher.model_copy(update={"dtype": "float32"})
    teacher = load_teacher(options, device="cpu", transformer=transformer.requires_grad_(False).eval())
    student = make_student(
        teacher.pipeline,
        fusion,
        max_sequence_length=options.max_sequence_length,
        guidance_range=(settings.strategy.guidance_min, settings.strategy.guidance_max),
        sigmas=_own_sigmas(settings, teacher),
    )
    save_student(student, folder)
    return student


def _own_sigmas(settings: Settings, teacher: Teacher) -> list[float] | None:
    """Starts of the student's own steps before the schedule's shift; none where it steps as its teacher."""
    if settings.student_steps == settings.strategy.num_steps:
        return None
    shift = teacher.family.shift(teacher.pipeline, teacher.latent_shape)
    sigmas = teacher.grid(settings.strategy.num_steps).sigmas.tolist()
    starts = [sigmas[k] for k in sub_grid(settings.strategy.num_steps, settings.student_steps)[:-1]]
    return [sigma / (shift - (shift - 1) * sigma) for sigma in starts]
