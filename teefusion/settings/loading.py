"""Settings from command line, variables, file and preset, laid over each other; and from the JSON that a run keeps."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_settings import EnvSettingsSource

from teefusion.errors import SettingsError, TeacherError
from teefusion.settings.run import Settings
from teefusion.settings.section import ENV_PREFIX, JOB_VARIABLE, Section

# Read elsewhere, and no settings: the image of the compiled pipeline's steps (pipelines/), the commit that it was built
# from (teefusion/lineage.py), the progress terminal.
# Nor are secrets: S3's credentials are read where a client is made (teefusion/storage/s3.py).
_OTHER_VARIABLES = frozenset(
    {"TEEFUSION_IMAGE", "TEEFUSION_COMMIT", "TEEFUSION_PROGRESS_TTY", JOB_VARIABLE}
    | {f"TEEFUSION_S3_{name}" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")}
)
# What Kubernetes tells pods of Services, such as the chart's `teefusion-mlflow`: TEEFUSION_MLFLOW_PORT_5000_TCP.
_SERVICE_VARIABLE = re.compile(
    r"[A-Z0-9]+(_[A-Z0-9]+)*_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)"
)


def presets() -> list[str]:
    """Names of the teachers that come with a preset, sorted."""
    folder = resources.files("teefusion") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_settings(
    *,
    config: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    entry: Mapping[str, Any] | None = None,
) -> Settings:
    """Settings from all sources. ``overrides`` are dotted keys (``train.steps``) from the command line; ``entry`` are
    sections that come right below them: one teacher of a list.

    Raises SettingsError naming every bad key, TeacherError for a teacher that is neither preset, folder nor hub id.
    """
    _refuse_unknown_variables()
    from_config = _read_yaml(config) if config else {}
    from_command = _nest(overrides or {})
    from_env = EnvSettingsSource(Settings)()
    merged = merge(merge(merge(from_config, from_env), entry or {}), from_command)
    name = _teacher_name(merged)
    return validate_settings(merge(_preset(name), merged))


def settings_from_json(text: str) -> Settings:
    """Settings as stored with a run. Raises SettingsError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"The run's settings are not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise SettingsError(f"The run's settings are a JSON {type(values).__name__}, an object is needed.")
    return validate_settings(values)


def job_settings(path: Path | None) -> Settings:
    """Settings of a rank or worker: from a file, or of a TrainJob's pod from its variable. Raises SettingsError."""
    if path is None and JOB_VARIABLE not in os.environ:
        raise SettingsError(f"There are no settings: give --settings FILE, or set {JOB_VARIABLE} to their JSON.")
    return settings_from_json(path.read_text() if path else os.environ[JOB_VARIABLE])


def namespace_settings(settings: Settings) -> Settings:
    """The settings in a pod of a pipeline: its variables (the namespace's ConfigMap) say where things are.

    But what the run says of its pods stays: steps are made with that already, and TrainJobs shall not differ from them.
    Raises SettingsError where they would change what is computed: that is the run's to say.
    """
    own = {"cluster": settings.cluster.model_dump(mode="json", exclude_defaults=True)}
    given = validate_settings(merge(merge(settings.model_dump(mode="json"), EnvSettingsSource(Settings)()), own))
    if given.run_key != settings.run_key:
        told = ", ".join(sorted(name for name in os.environ if name.startswith(ENV_PREFIX)))
        raise SettingsError(
            f"Variables of this pod would change what the run computes. Of {told}, take away from the ConfigMap what "
            "does not only say where things are; give it to 'teefusion submit' instead."
        )
    return given


def validate_settings(values: Mapping[str, Any]) -> Settings:
    """Settings from complete values. Raises SettingsError naming every bad key."""
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = [f"  {_told(item['loc'], item['type'], item['msg'], item['input'])}" for item in error.errors()]
        raise SettingsError("These settings cannot be used:\n" + "\n".join(lines)) from error


def _told(location: Sequence[int | str], kind: str, message: str, given: Any) -> str:
    """One of pydantic's findings, in our words where it has none for a person."""
    name = ".".join(map(str, location)) or "settings"
    if kind == "extra_forbidden":
        alike = get_close_matches(name, _names(), n=1)
        return f"{name}: there is no such setting" + (f"; {alike[0]} is one" if alike else "")
    return name + ": " + message.removeprefix("Value error, ") + ("" if kind == "value_error" else f" (got {given!r})")


def _names(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from _names(kind, f"{prefix}{name}.")


def _teacher_name(values: Mapping[str, Any]) -> str:
    teacher = values.get("teacher", {})
    name = teacher.get("name", "shapes") if isinstance(teacher, Mapping) else teacher
    if not isinstance(name, str):
        raise SettingsError(f"teacher.name must be a string, got {name!r}.")
    return name


def _preset(name: str) -> dict[str, Any]:
    """The preset called ``name``; for a folder or hub id, the defaults with that URI."""
    if name in presets():
        text = (resources.files("teefusion") / "presets" / f"{name}.yaml").read_text()
        values: dict[str, Any] = yaml.safe_load(text)
        return merge(values, {"teacher": {"name": name}})
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if Path(name).is_dir() or is_hub_id:
        return {"teacher": {"name": name, "uri": name}}
    raise TeacherError(
        f"Unknown teacher {name!r}: it is no preset ({', '.join(presets())}), no folder, and no hub id (owner/name)."
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"Cannot read the configuration {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected a mapping of sections such as `train:`, got {type(values).__name__}.")
    return values


def _nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        *sections, leaf = key.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    return nested


def merge(weak: Mapping[str, Any], strong: Mapping[str, Any]) -> dict[str, Any]:
    """``weak`` with ``strong`` laid over it, section by section; neither is changed."""
    merged = dict(weak)
    for key, value in strong.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = merge(below, value) if both and below is not None else value
    return merged


def _refuse_unknown_variables() -> None:
    """pydantic-settings ignores misspelt variables; a run that silently trains with a default is worse than none."""
    known = {ENV_PREFIX + name.replace(".", "__").upper() for name in _names()} | _OTHER_VARIABLES
    unknown = sorted(
        name
        for name in os.environ
        if name.startswith(ENV_PREFIX) and name.upper() not in known and not _SERVICE_VARIABLE.fullmatch(name)
    )
    if unknown:
        raise SettingsError(
            f"Unknown variable{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}: no setting has that name. "
            "Sections are joined with two underscores, as in TEEFUSION_TRAIN__STEPS."
        )
