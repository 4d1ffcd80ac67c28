"""Make, save and load students, and prove that a saved one loads and runs.

A student folder is a diffusers folder whose transformer has the stock class, names and shapes; what makes it a
student is ``fusion`` in model_index.json. The pipelines that run it are in ``student_pipelines``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from teefusion.errors import StorageError, StudentError
from teefusion.files import publish_folder
from teefusion.fusion import Fusion
from teefusion.published import is_published
from teefusion.student_index import read_index
from teefusion.student_pipelines import StudentPipeline, student_class


def make_student(
    pipeline: Any,
    fusion: Fusion,
    *,
    max_sequence_length: int,
    guidance_range: tuple[float, float] | None = None,
    sigmas: Sequence[float] | None = None,
) -> Any:
    """A student pipeline of a stock one's parts; its transformer is fused unless it is so already.

    Outside ``guidance_range``, the scales it is trained on, the student warns once. ``sigmas`` are the starts of its
    own steps, before the scheduler's shift, where it was trained to take fewer than its teacher.
    """
    parts = {name: getattr(pipeline, name, None) for name in pipeline.components}
    student = student_class(pipeline)(
        **parts,
        fusion=fusion.model_dump(),
        max_sequence_length=max_sequence_length,
        guidance_range=guidance_range,
        sigmas=sigmas,
    )
    student.set_progress_bar_config(disable=True)
    return student


def save_student(student: Any, folder: Path) -> None:
    """Save to ``folder`` whole or not at all, after loading the copy back and seeing that it makes the same picture.

    Raises StudentError if the saved copy differs, StorageError if it cannot be written.
    """
    with publish_folder(folder) as temporary:
        try:
            student.save_pretrained(temporary, safe_serialization=True)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"Cannot write the student to {folder}: {error}. Free some space and run again."
            ) from error
        _check_copy(student, load_student(temporary))


def is_student(folder: Path) -> bool:
    """Whether a folder says that it is one; it may still be damaged."""
    try:
        index = read_index(folder)
    except StudentError:
        return False
    return _says_so(folder, index)


def _says_so(folder: Path, index: dict[str, Any]) -> bool:
    return "fusion" in index or is_published(folder, index)


def load_student(folder: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A student pipeline from a folder. Raises StudentError for a folder that is none."""
    folder = Path(folder)
    if not _says_so(folder, read_index(folder)):
        raise StudentError(f"{folder} is a diffusers folder but no student: model_index.json has no 'fusion'.")
    try:
        student = StudentPipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except StudentError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds for a damaged folder
        raise StudentError(f"{folder} cannot be loaded as a student: {error}") from error
    student.set_progress_bar_config(disable=True)
    student.vae.to(memory_format=torch.channels_last)  # as for the teacher, whose speed it is compared with
    return student.to(device)


def _check_copy(student: Any, copy: Any) -> None:
    """The same weights to the bit, and two steps of both from one seed give the same picture."""
    saved = copy.transformer.state_dict()
    for name, value in student.transformer.state_dict().items():
        if not torch.equal(value.cpu(), saved[name].cpu()):
            raise StudentError(f"The saved student has other weights than the trained one: {name} differs.")
    trained, loaded = _two_steps(student), _two_steps(copy)
    # Not to the bit: where a tensor lies in memory chooses the kernel, and so the last digit.
    if not torch.allclose(trained, loaded, atol=1e-3, rtol=1e-3):
        difference = float((trained - loaded).abs().max())
        raise StudentError(f"The saved student makes other pictures than the trained one (off by {difference:.3g}).")


def _two_steps(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator(pipeline.device).manual_seed(0)
    result = pipeline(
        "", guidance_scale=3.0, num_inference_steps=2, sigmas=[1.0, 0.5], generator=generator, output_type="latent"
    )
    latents: torch.Tensor = result.images.float().cpu()
    return latents
