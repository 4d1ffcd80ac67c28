"""Everything configurable, as one typed, frozen model that is checked before anything is spent.

Sources, strongest first: command line, ``TEEFUSION_*`` variables (nested with ``__``; ``null`` is none), the
``--config`` file, the teacher's preset, the defaults. An unknown key is an error in every one of them.

Guidance is always diffusers' ``s`` (``uncond + s * (cond - uncond)``); the papers' ``w`` is ``s - 1``.
"""

from __future__ import annotations

from teefusion.settings.cluster import (
    NAMESPACE_VARIABLES,
    SECRET_KEYS,
    ClusterSettings,
    JobStage,
    PipelineStep,
    StepSettings,
    TolerationSettings,
)
from teefusion.settings.loading import (
    job_settings,
    load_settings,
    merge,
    namespace_settings,
    presets,
    settings_from_json,
    validate_settings,
)
from teefusion.settings.method import (
    FusionSettings,
    Inverse,
    LegSettings,
    PromptSettings,
    StrategySettings,
    StudentSettings,
    TargetSettings,
    TeacherSettings,
    WeightsSource,
)
from teefusion.settings.run import Settings
from teefusion.settings.section import ENV_PREFIX, JOB_VARIABLE
from teefusion.settings.serve import ServeSettings
from teefusion.settings.services import KfpSettings, MlflowSettings, StorageSettings
from teefusion.settings.train import TrainSettings
from teefusion.settings.verdict import EvaluateSettings, GateSettings

__all__ = [
    "ENV_PREFIX",
    "JOB_VARIABLE",
    "NAMESPACE_VARIABLES",
    "SECRET_KEYS",
    "ClusterSettings",
    "EvaluateSettings",
    "FusionSettings",
    "GateSettings",
    "Inverse",
    "JobStage",
    "KfpSettings",
    "LegSettings",
    "MlflowSettings",
    "PipelineStep",
    "PromptSettings",
    "ServeSettings",
    "Settings",
    "StepSettings",
    "StorageSettings",
    "StrategySettings",
    "StudentSettings",
    "TargetSettings",
    "TeacherSettings",
    "TolerationSettings",
    "TrainSettings",
    "WeightsSource",
    "job_settings",
    "load_settings",
    "merge",
    "namespace_settings",
    "presets",
    "settings_from_json",
    "validate_settings",
]
