"""What makes a student folder a loadable MLflow model, too: an MLmodel file and its environment, beside the weights.

The flavour is MLflow's loader module, ``teefusion.registry.pyfunc``: the folder holds no code and no pickle, and
loads wherever this package is installed.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from teefusion.errors import IntegrityError
from teefusion.files import sha256_folder, write_bytes
from teefusion.lineage import LIBRARIES

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

MLMODEL = "MLmodel"
_LOADED = "registered_model_meta"
"""What MLflow writes into the folder that it loads, even one that it did not fetch."""
_FILES = (
    *("conda.yaml", "input_example.json", "python_env.yaml", "requirements.txt", "serving_input_example.json"),
    *(MLMODEL, _LOADED),
)
_DIGEST = "student_files"
_LOADER = "teefusion.registry.pyfunc"
_STEPS = 20  # as in teefusion.generation, which loads torch
_GUIDANCE_SCALE = 4.0


def digest_of(student: Path) -> str:
    """The digest that a version carries: of the whole folder as it was registered."""
    return sha256_folder(student, besides=(_LOADED,))


def check_files(student: Path) -> None:
    """Raise IntegrityError where the student's own files are not those that ``MLmodel`` was written for."""
    from mlflow.models import Model

    expected = (Model.load(student / MLMODEL).metadata or {}).get(_DIGEST)
    if sha256_folder(student, besides=_FILES) != expected:
        raise IntegrityError(
            f"The files of {student} are not those that were registered. Nothing was loaded. Restore them, or load "
            "another version."
        )


def add_mlflow_files(student: Path, libraries: Mapping[str, str]) -> None:
    """Write MLflow's files into a student folder, ``MLmodel`` last; nothing where it is there. Raises StorageError.

    From then on they are part of the folder's digest. ``libraries`` are the versions that the student was trained with:
    where it is registered they need not be installed. One that is not among them is required in any version.
    """
    if (student / MLMODEL).exists():
        return
    import mlflow.pyfunc
    import pandas

    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "model"
        mlflow.pyfunc.save_model(
            made,
            loader_module=_LOADER,
            signature=_signature(student),
            metadata={_DIGEST: sha256_folder(student, besides=_FILES)},
            input_example=pandas.DataFrame({"prompt": ["a photo of a red star on a blue background"]}),
            pip_requirements=[f"{name}=={libraries[name]}" if name in libraries else name for name in LIBRARIES],
        )
        for name in _FILES:
            if (made / name).exists():
                write_bytes(student / name, (made / name).read_bytes())


def _signature(student: Path) -> ModelSignature:
    """Prompts in, PNG bytes out. Explicit: one that MLflow infers has no parameters, and then ignores them."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

    index = json.loads((student / "model_index.json").read_bytes())
    steps = len(index.get("sigmas") or ()) or _STEPS
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.string, "prompt")]),
        outputs=Schema([ColSpec(DataType.binary)]),
        params=ParamSchema(
            [
                ParamSpec("guidance_scale", DataType.double, _GUIDANCE_SCALE),
                ParamSpec("num_inference_steps", DataType.long, steps),
                ParamSpec("seed", DataType.long, 0),
            ]
        ),
    )
