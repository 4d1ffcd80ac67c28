"""MLflow's loader module of registered students: ``mlflow.pyfunc.load_model("models:/NAME@champion")`` comes here.

That the files are those that were registered is checked here. MLflow says not by which name they were asked for, so
the gate is checked by ``teefusion.registry.resolve`` alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from teefusion.devices import resolve_device
from teefusion.pictures import png_bytes
from teefusion.registry.packaging import check_files
from teefusion.students import load_student

_BATCH = 8


class StudentModel:
    """A student as MLflow's python_function flavour calls it."""

    def __init__(self, folder: Path) -> None:
        self._pipeline = load_student(folder, device=resolve_device("auto"))

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[bytes]:
        """One PNG for each row of the column ``prompt``.

        ``params`` are guidance_scale (diffusers' s), num_inference_steps and seed, with the signature's defaults. Each
        picture starts from the noise of ``seed``, whatever row it is.
        """
        options, prompts, pictures = dict(params or {}), list(model_input["prompt"]), []
        seed = int(options.pop("seed", 0))
        for start in range(0, len(prompts), _BATCH):
            batch = prompts[start : start + _BATCH]
            generators = [torch.Generator().manual_seed(seed) for _ in batch]
            pictures += self._pipeline(batch, generator=generators, **options).images
        return [png_bytes(picture) for picture in pictures]


def _load_pyfunc(path: str) -> StudentModel:
    """What MLflow calls with the model's folder. Raises IntegrityError, StudentError."""
    check_files(Path(path))
    return StudentModel(Path(path))
