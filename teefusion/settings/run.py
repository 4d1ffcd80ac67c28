"""All groups together: one run, completely described."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from pydantic import model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from teefusion.files import canonical_json, content_key
from teefusion.settings.cluster import ClusterSettings
from teefusion.settings.method import (
    FusionSettings,
    PromptSettings,
    StrategySettings,
    StudentSettings,
    TargetSettings,
    TeacherSettings,
)
from teefusion.settings.section import ENV_PREFIX, Section
from teefusion.settings.serve import ServeSettings
from teefusion.settings.services import KfpSettings, MlflowSettings, StorageSettings
from teefusion.settings.train import TrainSettings
from teefusion.settings.verdict import EvaluateSettings, GateSettings


class Settings(BaseSettings):
    """One run, completely described."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        env_parse_none_str="null",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
    )

    workdir: Path = Path("work")
    """Folder for everything a run makes."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    teacher: TeacherSettings = TeacherSettings()
    prompts: PromptSettings = PromptSettings()
    strategy: StrategySettings = StrategySettings()
    targets: TargetSettings = TargetSettings()
    fusion: FusionSettings = FusionSettings()
    student: StudentSettings = StudentSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    gate: GateSettings = GateSettings()
    mlflow: MlflowSettings = MlflowSettings()
    storage: StorageSettings = StorageSettings()
    cluster: ClusterSettings = ClusterSettings()
    serve: ServeSettings = ServeSettings()
    kfp: KfpSettings = KfpSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Given values only: ``load_settings`` lays the sources over each other, and stored settings stay as stored."""
        return (init_settings,)

    @model_validator(mode="after")
    def _states_fit_the_grid(self) -> Self:
        if self.targets.states_per_trajectory > self.strategy.num_steps:
            raise ValueError(
                f"targets.states_per_trajectory ({self.targets.states_per_trajectory}) is above strategy.num_steps "
                f"({self.strategy.num_steps}): a trajectory has no more states than steps"
            )
        return self

    @model_validator(mode="after")
    def _student_steps_are_stored(self) -> Self:
        steps, stored = self.student.num_steps, self.targets.states_per_trajectory
        if steps is not None and steps > self.strategy.num_steps:
            raise ValueError(
                f"student.num_steps ({steps}) is above strategy.num_steps ({self.strategy.num_steps}): a student takes "
                "no more steps than its teacher took"
            )
        if steps not in (None, self.strategy.num_steps) and self.targets.images:
            raise ValueError(f"student.num_steps ({steps}) joins steps of a trajectory: unset targets.images")
        if steps not in (None, self.strategy.num_steps) and self.train.states == "student":
            raise ValueError(f"student.num_steps ({steps}) joins stored steps: set train.states to stored")
        if steps not in (None, self.strategy.num_steps) and stored != self.strategy.num_steps:
            raise ValueError(
                f"student.num_steps ({steps}) joins the teacher's steps, which takes all of a trajectory's: set "
                f"targets.states_per_trajectory to strategy.num_steps ({self.strategy.num_steps}, not {stored})"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides_over_the_cluster(self) -> Self:
        if self.cluster.takes_trainjob("train"):
            ranks = self.cluster.nodes * self.cluster.processes_per_node
            ways = self.train.gradient_accumulation_steps * ranks
            if self.train.batch_size % ways:
                raise ValueError(
                    f"train.batch_size {self.train.batch_size} is not divisible by train.gradient_accumulation_steps "
                    f"{self.train.gradient_accumulation_steps} x cluster.nodes {self.cluster.nodes} x "
                    f"cluster.processes_per_node {self.cluster.processes_per_node} = {ways}"
                )
        return self

    @property
    def student_steps(self) -> int:
        """Steps of the student's grid."""
        return self.student.num_steps or self.strategy.num_steps

    def content(self) -> dict[str, Any]:
        """Every section's content: what determines the run's results, and nothing else."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value.content() for name, value in sections.items() if isinstance(value, Section)}

    def to_json(self) -> str:
        """Canonical JSON from which ``settings_from_json`` makes these settings again."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def run_key(self) -> str:
        """Name of this run: a hash of its content. Complete only once revision and prompt digest are filled in."""
        return content_key(self.content())

    @property
    def model_name(self) -> str:
        """Registered model's name in MLflow."""
        return self.mlflow.model_name or f"teefusion-{Path(self.teacher.name).name}"
