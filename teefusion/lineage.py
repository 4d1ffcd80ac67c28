"""What a student was made of and by, as far as that can be known from within."""

from __future__ import annotations

import contextlib
import os
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from teefusion.manifests import Manifest
from teefusion.settings import Settings

_PACKAGE = Path(__file__).parent
UNKNOWN = "unknown"
LINEAGE = ("prompt_set", "target_set", "target_set_digest", "code_commit", "image")
LIBRARIES = (
    *("teefusion", "mlflow", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers"),
    *("sentencepiece", "numpy", "pandas", "pillow"),
)
"""What a student is loaded by, as packages."""


def lineage(settings: Settings, manifest: Manifest) -> dict[str, str]:
    """Prompt set, target set and its manifest's digest, code commit and image: for the record and the registry."""
    return {
        "prompt_set": manifest.prompt_set,
        "target_set": manifest.key,
        "target_set_digest": manifest.digest,
        "code_commit": code_commit(),
        "image": os.environ.get("TEEFUSION_IMAGE") or settings.cluster.image or UNKNOWN,
    }


def library_versions() -> dict[str, str]:
    """Versions of those of `LIBRARIES` that are here, without local parts such as ``+cpu``, which no index has."""
    versions = {}
    for name in LIBRARIES:
        with contextlib.suppress(PackageNotFoundError):  # the training that asks is paid for
            versions[name] = version(name).partition("+")[0]
    return versions


def code_commit() -> str:
    """``TEEFUSION_COMMIT``, as images carry it, else the commit of this source tree, ``-dirty`` where changed."""
    if commit := os.environ.get("TEEFUSION_COMMIT"):
        return commit
    # A package installed below somebody else's repository is not tracked by it.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return UNKNOWN
    changed = _git("status", "--porcelain", "--untracked-files=no", ".")
    return (_git("rev-parse", "HEAD") or UNKNOWN) + ("-dirty" if changed else "")


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(_PACKAGE), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
