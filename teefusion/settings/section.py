"""What all groups of settings share."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

ENV_PREFIX = "TEEFUSION_"
JOB_VARIABLE = "TEEFUSION_JOB_SETTINGS"
"""Carries a TrainJob's settings to its pods, as JSON."""


class Section(BaseModel):
    """A group of settings. ``operational`` names those that change where or how fast, never what is computed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    operational: ClassVar[frozenset[str]] = frozenset()

    def content(self) -> dict[str, Any]:
        """The settings that determine results, JSON-ready; hashed into content keys."""
        return self.model_dump(mode="json", exclude=set(self.operational))
