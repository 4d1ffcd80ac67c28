"""The arguments of a pipeline's run: settings by name where people change them from run to run, one JSON for the rest.

A setting is in one of both, so there is nothing to keep in step.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teefusion.errors import SettingsError
from teefusion.files import canonical_json
from teefusion.settings import Settings, namespace_settings, validate_settings
from teefusion.sources import paths_of

PARAMETERS: dict[str, str] = {
    "teacher": "teacher.name",
    "teacher_uri": "teacher.uri",
    "teacher_revision": "teacher.revision",
    "prompts": "prompts.source",
    "strategy": "strategy.name",
    "guidance_min": "strategy.guidance_min",
    "guidance_max": "strategy.guidance_max",
    "student": "student",
    "fusion": "fusion",
    "train_steps": "train.steps",
    "gate": "gate",
}
"""Setting of each of the pipeline's parameters; a section is a parameter as a whole."""
POD_VARIABLE = "KFP_POD_NAME"
"""In every step of Kubeflow Pipelines on a cluster; a host name may be cut short."""


def arguments_of(settings: Settings) -> dict[str, Any]:
    """Arguments with which the pipeline runs these settings; `settings` among them is the JSON of the rest."""
    values = settings.model_dump(mode="json")
    for section in ("student", "fusion", "gate"):  # what is none there is so by default, and KFP knows no none
        values[section] = {key: value for key, value in values[section].items() if value is not None}
    arguments = {name: _take(values, setting) for name, setting in PARAMETERS.items()}
    arguments["teacher_revision"] = arguments["teacher_revision"] or ""
    return {"settings": canonical_json(values)} | arguments


def settings_of(arguments: Mapping[str, Any]) -> Settings:
    """The settings that a run was given, with those of its namespace where it runs in a pod. Raises SettingsError."""
    try:
        values: dict[str, Any] = json.loads(arguments["settings"])
    except ValueError as error:
        raise SettingsError(f"The parameter 'settings' is not valid JSON: {error}.") from error
    for name, setting in PARAMETERS.items():
        _put(values, setting, arguments[name])
    values["teacher"]["revision"] = arguments["teacher_revision"] or None
    settings = validate_settings(values)
    return namespace_settings(settings) if POD_VARIABLE in os.environ else settings


def on_cluster(settings: Settings) -> Settings:
    """The settings as pods can follow them: the workdir on the shared volume, and no path of this machine.

    Raises SettingsError naming every path that is not on the volume.
    """
    volume = settings.cluster.volume_path
    if volume is not None and not settings.workdir.is_absolute():
        settings = settings.model_copy(update={"workdir": volume / settings.workdir})
    paths = paths_of(settings) | ({"workdir": str(settings.workdir)} if settings.workdir.is_absolute() else {})
    lost = {
        name: path
        for name, path in paths.items()
        if volume is None or not Path(path).is_relative_to(volume) or ".." in Path(path).parts
    }
    if lost:
        where = f"which is at {volume}" if volume else "and none is set (cluster.volume_claim, cluster.volume_path)"
        lines = "\n".join(f"  {name}: {path}" for name, path in sorted(lost.items()))
        raise SettingsError(
            f"Pods see only paths on the shared volume, {where}. These are not:\n{lines}\nPut them there and give "
            "absolute paths; a teacher may be a hub id."
        )
    return settings


def _take(values: dict[str, Any], setting: str) -> Any:
    *sections, leaf = setting.split(".")
    for section in sections:
        values = values[section]
    return values.pop(leaf)


def _put(values: dict[str, Any], setting: str, value: Any) -> None:
    *sections, leaf = setting.split(".")
    for section in sections:
        values = values.setdefault(section, {})
    values[leaf] = value
