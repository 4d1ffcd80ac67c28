"""A teacher's files, looked at and not loaded: which transformer, how large, and whether all parts have weights.

From a folder, or from the hub with a few small requests (the headers of safetensors files say their sizes). No torch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from teefusion.errors import TeacherError
from teefusion.settings import TeacherSettings, WeightsSource
from teefusion.sources import bundled_path

TRANSFORMERS = frozenset({"SD3Transformer2DModel", "FluxTransformer2DModel"})
"""What can be fused, as ``families.FAMILIES`` has it; that one takes torch."""
_INDEX = "model_index.json"
_WEIGHTLESS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "FeatureExtractor")


@dataclass(frozen=True)
class TeacherFiles:
    """What a teacher's files say of its transformer."""

    transformer: str
    """Its class in diffusers."""
    config: dict[str, Any]
    vae_scale_factor: int
    """Pixels a latent, along each side."""
    parameters: int


class _Source(Protocol):
    where: str

    def names(self) -> set[str]: ...

    def read_json(self, name: str) -> dict[str, Any]: ...

    def parameters(self, name: str) -> int: ...


def teacher_files(teacher: TeacherSettings) -> TeacherFiles:
    """Look at a teacher. Raises TeacherError for what is missing, of no known family, or behind a licence."""
    folder = bundled_path(teacher.uri)
    source: _Source = _Folder(folder) if folder else _Hub(teacher.uri, teacher.revision)
    names = source.names()
    if _INDEX not in names:
        raise TeacherError(f"{source.where} is no diffusers pipeline: it has no {_INDEX}. Correct teacher.uri.")
    index = source.read_json(_INDEX)
    parts = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and entry[0] is not None}
    kind = str(parts.get("transformer"))
    if kind not in TRANSFORMERS:
        raise TeacherError(
            f"{source.where} has the transformer {kind}, which cannot be fused; known are "
            f"{', '.join(sorted(TRANSFORMERS))}. Correct teacher.uri."
        )
    _require_weights(source.where, parts, names)
    config, vae = source.read_json("transformer/config.json"), source.read_json("vae/config.json")
    weights = [name for name in names if name.startswith("transformer/") and _is_weights(name)]
    return TeacherFiles(
        transformer=kind,
        config=config,
        vae_scale_factor=2 ** (len(vae["block_out_channels"]) - 1),
        parameters=sum(source.parameters(name) for name in weights),
    )


def require_source(source: WeightsSource) -> str:
    """That a strategy's further weights are there and may be had; what was found. Raises TeacherError."""
    if Path(source.uri).exists():
        return f"{source.uri} is there"
    _Hub(source.uri, source.revision).names()
    return f"{source.uri} on the hub may be had"


def _require_weights(where: str, parts: dict[str, Any], names: set[str]) -> None:
    lacking = [
        part
        for part, kind in parts.items()
        if not str(kind).endswith(_WEIGHTLESS) and not any(n.startswith(f"{part}/") and _is_weights(n) for n in names)
    ]
    if lacking:
        raise TeacherError(
            f"{where} is incomplete: there are no safetensors files of {', '.join(sorted(lacking))}. Fetch or save it "
            "again, or correct teacher.uri and teacher.revision."
        )


def _is_weights(name: str) -> bool:
    """Whether a file is loaded: variants (`model.fp16.safetensors`) lie beside it."""
    return name.endswith(".safetensors") and name.rpartition("/")[2].count(".") == 1


class _Folder:
    def __init__(self, folder: Path) -> None:
        self._folder, self.where = folder, str(folder)

    def names(self) -> set[str]:
        return {path.relative_to(self._folder).as_posix() for path in self._folder.rglob("*") if path.is_file()}

    def read_json(self, name: str) -> dict[str, Any]:
        try:
            value: dict[str, Any] = json.loads((self._folder / name).read_text(encoding="utf-8"))
            return value
        except (OSError, ValueError) as error:
            raise TeacherError(
                f"{self._folder / name} cannot be read ({error}). Fetch or save the folder again."
            ) from error

    def parameters(self, name: str) -> int:
        try:
            with (self._folder / name).open("rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        except (OSError, ValueError) as error:
            raise TeacherError(
                f"{self._folder / name} is no safetensors file ({error}). Fetch or save it again."
            ) from error
        return sum(math.prod(entry["shape"]) for key, entry in header.items() if key != "__metadata__")


class _Hub:
    def __init__(self, uri: str, revision: str | None) -> None:
        self._uri, self._revision = uri, revision
        self.where = f"{uri} on the hub"

    def names(self) -> set[str]:
        """Files of the repository, once a file of it could be had: a gated one lists them to everybody."""
        from huggingface_hub import HfApi

        def look() -> set[str]:
            api = HfApi()
            found = api.model_info(self._uri, revision=self._revision, timeout=10)
            api.auth_check(self._uri)
            return {sibling.rfilename for sibling in found.siblings or []}

        return set(self._ask(look))

    def read_json(self, name: str) -> dict[str, Any]:
        from huggingface_hub import hf_hub_download

        path = self._ask(lambda: hf_hub_download(self._uri, name, revision=self._revision))
        value: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        return value

    def parameters(self, name: str) -> int:
        from huggingface_hub import HfApi

        found = self._ask(lambda: HfApi().parse_safetensors_file_metadata(self._uri, name, revision=self._revision))
        return sum(found.parameter_count.values())

    def _ask(self, call: Any) -> Any:
        from huggingface_hub.errors import GatedRepoError, HTTPError  # type: ignore[attr-defined]

        try:
            return call()
        except GatedRepoError as error:
            raise TeacherError(
                f"{self._uri} is gated. Accept its licence on its page of the hub, and give a token of that account: "
                "HF_TOKEN, on a cluster in the Secret of cluster.hub_secret."
            ) from error
        except (HTTPError, OSError, ValueError) as error:
            told = str(error).partition("\n")[0].rstrip(".")
            raise TeacherError(
                f"{self._uri} (revision {self._revision or 'main'}) cannot be looked up on the hub: {told}. Correct "
                "teacher.uri or teacher.revision; a private one takes HF_TOKEN."
            ) from error
