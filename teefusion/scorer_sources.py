"""Find a scorer's files, on this machine, on the hub or in S3, and tell exactly which they are. Imports no torch."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teefusion.errors import ScorerError
from teefusion.files import content_key, sha256_file, sha256_folder, write_bytes
from teefusion.scorer_names import (
    BUNDLED,
    DEFAULT_TOKENIZER,
    HpsVersion,
    Kind,
    Transparency,
    hps_version,
    parse_scorer,
)
from teefusion.settings import Settings, StorageSettings
from teefusion.shapes import SCORER_DIR

HPS_REPOSITORY = "xswu/HPSv2"
HPS_FILES: dict[str, str] = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}

_TITLES: dict[Kind, str] = {"folder": "", "hps": "HPS", "clip": "CLIPScore", "pickscore": "PickScore"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json")
# From the hub come these and nothing else: no pickled weights, and no weights of other frameworks.
_MODEL_FILES = ("config.json", "preprocessor_config.json", "*.safetensors", "*.safetensors.index.json")


@dataclass(frozen=True)
class ScorerSource:
    """A scorer's files, all on this machine, with their digests and what else decides its scores."""

    name: str
    """For reports."""
    kind: Kind
    path: Path
    """A transformers CLIP folder; of `hps` the checkpoint, a file."""
    weights_sha256: str
    """Of that folder or file."""
    tokenizer: Path
    """Folder with a CLIP tokenizer."""
    tokenizer_sha256: str | None = None
    """None where it is in the folder that ``weights_sha256`` is of."""
    version: str | None = None
    """Of HPS: v2.0 or v2.1."""
    revision: str | None = None
    """Commit on the hub, where the weights are from there."""
    antialias: bool = True
    transparency: Transparency = "white"

    def identity(self) -> dict[str, Any]:
        """What the scores follow from, JSON-ready; wherever the files lie, and under whatever name."""
        return {
            "kind": self.kind,
            "weights_sha256": self.weights_sha256,
            "tokenizer_sha256": self.tokenizer_sha256,
            "version": self.version,
            "antialias": self.antialias,
            "transparency": self.transparency,
        }


def scorer_of(settings: Settings) -> ScorerSource:
    """The scorer that ``settings.evaluate`` names. Raises ScorerError, StorageError."""
    options = settings.evaluate
    return find_scorer(
        options.scorer,
        version=options.scorer_version,
        revision=options.scorer_revision,
        tokenizer=options.tokenizer,
        antialias=options.antialias,
        transparency=options.transparency,
        storage=settings.storage,
        copies=settings.workdir / "scorers",
    )


def find_scorer(
    scorer: str,
    *,
    version: HpsVersion | None = None,
    revision: str | None = None,
    tokenizer: str = DEFAULT_TOKENIZER,
    antialias: bool = True,
    transparency: Transparency = "white",
    storage: StorageSettings | None = None,
    copies: Path = Path("scorers"),
) -> ScorerSource:
    """The scorer of that name (see ``EvaluateSettings.scorer``), fetched where it is not here, and hashed.

    ``revision`` is a hub commit; ``tokenizer`` serves weights that come without one; a checkpoint in S3 is copied into
    ``copies``. Raises ScorerError for what is no scorer or cannot be had, StorageError.
    """
    name = parse_scorer(scorer)
    kind, location = name.kind, name.location
    told = hps_version(location, version) if kind == "hps" else None
    if kind == "hps":
        path, commit = _checkpoint(location, revision, storage or StorageSettings(), copies)
        digest = sha256_file(path)
    else:
        path, commit = _folder(scorer, kind, location, revision)
        digest = sha256_folder(path) if commit is None else _digest(path, (*_MODEL_FILES, *_TOKENIZER_FILES))
    if revision is not None and commit is None:
        raise ScorerError(
            f"evaluate.scorer_revision is {revision!r}, but {location} is not on the hub. Unset it: what lies here is "
            "known by its digest."
        )
    has_own = kind != "hps" and _has_tokenizer(path)
    if not has_own and kind == "folder":
        raise ScorerError(
            f"{path} has no tokenizer (tokenizer.json, or vocab.json and merges.txt). Save the CLIPTokenizer beside "
            "the model."
        )
    words = path if has_own else _tokenizer(tokenizer)
    return ScorerSource(
        name=_title(kind, scorer, told, location),
        kind=kind,
        path=path,
        weights_sha256=digest,
        tokenizer=words,
        tokenizer_sha256=None if has_own else _digest(words, _TOKENIZER_FILES),
        version=told,
        revision=commit,
        antialias=antialias,
        transparency=transparency,
    )


def _title(kind: Kind, scorer: str, version: str | None, location: str) -> str:
    if kind == "folder":
        return scorer if scorer == BUNDLED else Path(scorer).name
    return f"HPS {version}" if kind == "hps" else f"{_TITLES[kind]} ({location})"


# A folder, here or on the hub


def _folder(scorer: str, kind: Kind, location: str, revision: str | None) -> tuple[Path, str | None]:
    """Folder of a transformers CLIP, and the commit where it came from the hub."""
    path = SCORER_DIR if scorer == BUNDLED else Path(location).expanduser()
    commit = None
    if kind != "folder" and not path.is_dir() and _is_hub_id(location):
        path = _from_hub(location, revision, (*_MODEL_FILES, *_TOKENIZER_FILES))
        commit = path.name
    _check_folder(path)
    return path, commit


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ScorerError(
            f"{folder} is no scorer: config.json is missing. Set evaluate.scorer to {BUNDLED!r} or to a folder with a "
            "CLIPModel and its tokenizer in transformers' layout."
        )
    kind = read_json_object(config).get("model_type")
    if kind != "clip":
        raise ScorerError(
            f"{folder} holds a model of type {kind!r}, and scorers are of type 'clip'. Name a CLIP folder in "
            "evaluate.scorer."
        )


def read_json_object(file: Path) -> dict[str, Any]:
    """A JSON object that came with a scorer. Raises ScorerError."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScorerError(f"{file} cannot be read: {error}. Fetch the scorer again.") from error
    if not isinstance(value, dict):
        raise ScorerError(f"{file} holds no JSON object. Fetch the scorer again.")
    return value


def _has_tokenizer(folder: Path) -> bool:
    """Without these files transformers makes an empty tokenizer, to which all prompts are the same."""
    return (folder / "tokenizer.json").is_file() or (folder / "vocab.json").is_file()


def _tokenizer(location: str) -> Path:
    """Folder of ``evaluate.tokenizer``."""
    path = Path(location).expanduser()
    if not path.is_dir() and _is_hub_id(location):
        path = _from_hub(location, None, _TOKENIZER_FILES)
    if not _has_tokenizer(path):
        raise ScorerError(
            f"{path} has no CLIP tokenizer (tokenizer.json, or vocab.json and merges.txt), and the scorer's weights "
            "come without one. Set evaluate.tokenizer to a folder that has one, such as a teacher's `tokenizer`."
        )
    return path


# A checkpoint of HPS


def _checkpoint(location: str, revision: str | None, storage: StorageSettings, copies: Path) -> tuple[Path, str | None]:
    """File with the published checkpoint, and the commit where it came from the hub."""
    from teefusion.storage import is_remote, local_path

    if location in HPS_FILES:
        folder = _from_hub(HPS_REPOSITORY, revision, (HPS_FILES[location],))
        return folder / HPS_FILES[location], folder.name
    if is_remote(location):
        return _from_s3(location, storage, copies), None
    path = local_path(location).expanduser()
    if not path.is_file():
        raise ScorerError(
            f"{path} is no file. Set evaluate.scorer to hps: and the path or s3:// URI of {HPS_FILES['v2.1']} or "
            f"{HPS_FILES['v2.0']}; or to hps:v2.1 or hps:v2.0, to fetch it from the hub."
        )
    return path, None


def _from_s3(uri: str, storage: StorageSettings, copies: Path) -> Path:
    """A copy of an object. One that is here is used again while the object's size stays the same."""
    from teefusion.storage import open_store

    folder, _, name = uri.rpartition("/")
    store = open_store(folder, storage)
    copy = copies / content_key(uri) / name
    if not copy.is_file() or copy.stat().st_size != store.size(name):
        write_bytes(copy, store.read(name))
    return copy


# The hub


def _is_hub_id(location: str) -> bool:
    return location.count("/") == 1 and not location.startswith((".", "/", "~"))


def _from_hub(repository: str, revision: str | None, files: Sequence[str]) -> Path:
    """Folder with those files of a hub repository, named by their commit; from the hub's own cache when offline."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(files)))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ScorerError(
            f"Cannot fetch {repository!r} from the hub: {error} Check the id and the network; or fetch its files "
            "elsewhere and give their path (evaluate.scorer, evaluate.tokenizer)."
        ) from error


def _digest(folder: Path, patterns: Sequence[str]) -> str:
    """sha256 over the files of that name: other programs put further ones into the hub's cache."""
    names = sorted(file.name for file in folder.iterdir() if any(fnmatch.fnmatch(file.name, p) for p in patterns))
    return content_key([[name, sha256_file(folder / name)] for name in names], length=64)
