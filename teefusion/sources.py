"""Where teachers, scorers and prompts come from, and which exact version a run means. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from teefusion import shapes
from teefusion.errors import SettingsError, TeacherError
from teefusion.files import sha256_file, sha256_folder
from teefusion.prompt_files import source_digest
from teefusion.scorer_names import BUNDLED
from teefusion.settings import Settings, TeacherSettings, WeightsSource

_BUNDLED_TEACHER = "bundled:shapes"
_DIGEST = "sha256:"


def bundled_path(uri: str) -> Path | None:
    """Folder of a teacher URI that lies on this machine, or none for a hub id."""
    if uri == _BUNDLED_TEACHER:
        return shapes.TEACHER_DIR
    path = Path(uri)
    return path if path.is_dir() else None


def prompt_path(source: str) -> Path:
    """File or folder of a prompt source."""
    return shapes.PROMPTS_FILE if source == BUNDLED else Path(source)


def require_fitting_scorer(settings: Settings, of: TeacherSettings | None = None) -> None:
    """Raises SettingsError where the bundled arbiter, which knows coloured shapes, would judge another teacher.

    ``of`` is that teacher, where it is not the settings' own.
    """
    teacher = of or settings.teacher
    if settings.evaluate.scorer == BUNDLED and teacher.uri != _BUNDLED_TEACHER:
        raise SettingsError(
            f"evaluate.scorer is {BUNDLED}, which can only judge the bundled teacher's coloured shapes; the teacher is "
            f"{teacher.name}. Name a real scorer: --scorer hps:/models/HPS_v2.1_compressed.pt, "
            "clip:openai/clip-vit-large-patch14, ... (docs/evaluation.md)."
        )


def require_fitting_prompts(settings: Settings) -> None:
    """Raises SettingsError where the bundled captions of coloured shapes would be the prompts of another teacher."""
    if settings.prompts.source == BUNDLED and settings.teacher.uri != _BUNDLED_TEACHER:
        raise SettingsError(
            f"prompts.source is {BUNDLED}, captions of coloured shapes, and the teacher is {settings.teacher.name}. "
            "Give prompts that are like those the student will meet: --prompts FILE."
        )


def revision_of(source: TeacherSettings | WeightsSource) -> str:
    """``sha256:...`` over a file or the files of a folder; the commit of a hub id. Raises TeacherError."""
    folder = bundled_path(source.uri)
    if folder is not None:
        return f"{_DIGEST}{sha256_folder(folder)[:16]}"
    if Path(source.uri).is_file():
        return f"{_DIGEST}{sha256_file(Path(source.uri))[:16]}"
    if _is_path(source.uri):
        raise TeacherError(f"{source.uri} is not on this machine. Correct the path, or give a hub id, owner/name.")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the network, and all of the hub's

    try:
        sha = HfApi().model_info(source.uri, revision=source.revision).sha
    except (HTTPError, OSError, ValueError) as error:
        raise TeacherError(
            f"Cannot look up {source.uri!r} on the hub: {error}. Check the id, the network and, for a gated model, "
            "that HF_TOKEN is set and its licence accepted; or give a local diffusers folder."
        ) from error
    if sha is None:
        raise TeacherError(f"The hub gave no commit for {source.uri!r}; set its revision.")
    return str(sha)


def paths_of(settings: Settings) -> dict[str, str]:
    """Sources that are plainly paths, by their setting."""
    strategy = settings.strategy
    sources = {
        "teacher.uri": settings.teacher.uri,
        "strategy.second.uri": strategy.second.uri if strategy.second else None,
        "strategy.lora.uri": strategy.lora.uri if strategy.lora else None,
    }
    paths = {name: uri for name, uri in sources.items() if uri and _is_path(uri)}
    if settings.prompts.source != _BUNDLED_TEACHER:
        paths["prompts.source"] = settings.prompts.source
    if settings.targets.images:
        paths["targets.images"] = settings.targets.images
    return paths


def pin(settings: Settings, *, elsewhere: bool = False) -> Settings:
    """The settings with revisions and prompt digest filled in, so that they describe one run for good.

    With ``elsewhere``, absolute paths that are not on this machine are left as they are: a cluster's volume has them.
    Raises TeacherError for files that are not of the revision given.
    """

    def revision(source: TeacherSettings | WeightsSource) -> str | None:
        if elsewhere and _is_away(source.uri):
            return source.revision
        found = revision_of(source)
        if found.startswith(_DIGEST) and source.revision not in (None, found):
            raise TeacherError(
                f"{source.uri} is not revision {source.revision}: its files have the digest {found}. Restore them, or "
                "leave the revision out to take them as they are."
            )
        return found

    teacher = settings.teacher.model_copy(update={"revision": revision(settings.teacher)})
    prompts = settings.prompts
    if not (elsewhere and _is_away(prompts.source)):
        prompts = prompts.model_copy(update={"sha256": source_digest(prompt_path(prompts.source))})
    further = {
        name: source.model_copy(update={"revision": revision(source)})
        for name in ("second", "lora")
        if (source := getattr(settings.strategy, name)) is not None
    }
    strategy = settings.strategy.model_copy(update=further)
    changed = {"teacher": teacher, "prompts": prompts, "strategy": strategy}
    if settings.targets.images is not None and not (elsewhere and _is_away(settings.targets.images)):
        digest = sha256_folder(Path(settings.targets.images))
        changed["targets"] = settings.targets.model_copy(update={"images_sha256": digest})
    return settings.model_copy(update=changed)


def _is_path(uri: str) -> bool:
    """Hub ids look like relative paths, so those need a dot first."""
    return uri.startswith(("/", "./", "../", "~"))


def _is_away(path: str) -> bool:
    return Path(path).is_absolute() and not Path(path).exists()
