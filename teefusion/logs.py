"""Logging of the command line and of stages: one line a record on standard error, libraries kept quiet."""

from __future__ import annotations

import logging
import os
import sys
import warnings

_NOISY = (
    "diffusers",
    "transformers",
    "accelerate",
    "mlflow",
    "alembic",
    "torch",
    "huggingface_hub",
    "httpx",
    "DeepSpeed",
)


STAGE_MARK = "teefusion| "
"""Starts every line that a stage in a process of its own means for the person who watches the run."""


def setup_logging(*, verbose: bool = False, mark: str = "") -> None:
    """Our own records at INFO, libraries' at ERROR unless ``verbose``; each line starts with ``mark``.

    Ranks other than 0 report warnings only.
    """
    rank = int(os.environ.get("RANK", "0"))
    level = logging.DEBUG if verbose else logging.INFO if rank == 0 else logging.WARNING
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter(f"{mark}%(asctime)s  %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("teefusion").setLevel(level)
    if not verbose:
        quiet_libraries()


def quiet_libraries() -> None:
    """Their notices (a missing torchvision, deprecated arguments of their own calls) say nothing to our users."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in _NOISY:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
