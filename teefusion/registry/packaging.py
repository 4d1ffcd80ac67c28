"""What makes a student folder a loadable MLflow model, too: an MLmodel file and its environment, beside the weights.

The flavour is MLflow's loader module, ``teefusion.registry.pyfunc``: the folder holds no code and no pickle, and
loads wherever this package is installed.
"""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from teefusion.files import write_bytes

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

MLMODEL = "MLmodel"
_LOADER = "teefusion.registry.pyfunc"
_STEPS = 20  # as in teefusion.generation, which loads torch
_GUIDANCE_SCALE = 4.0
_REQUIREMENTS = (
    *("teefusion", "mlflow", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers"),
    *("sentencepiece", "numpy", "pandas", "pillow"),
)


def add_mlflow_files(student: Path) -> None:
    """Write MLflow's files into a student folder, ``MLmodel`` last; nothing where it is there. Raises StorageError.

    From then on they are part of the folder's digest.
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
            input_example=pandas.DataFrame({"prompt": ["a photo of a red star on a blue background"]}),
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in _REQUIREMENTS],
        )
        files = sorted((path for path in made.iterdir() if path.is_file()), key=lambda path: path.name == MLMODEL)
        for path in files:
            write_bytes(student / path.name, path.read_bytes())


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
