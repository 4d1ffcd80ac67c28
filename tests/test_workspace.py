"""Records of a run's stages."""

from __future__ import annotations

from collections.abc import Callable

from teefusion.settings import Settings
from teefusion.workspace import Workspace


def test_of_alike_steps_the_one_that_made_something_is_told(make_settings: Callable[..., Settings]) -> None:
    workspace = Workspace(make_settings())
    workspace.start()
    workspace.stage("targets", "a set", lambda: ({"states": 8}, False))
    assert workspace.stage("targets", "a set", lambda: ({"states": 8}, True)).reused
    assert workspace.records()["targets"]["reused"] is False
    workspace.stage("targets", "another", lambda: ({}, True))
    assert workspace.records()["targets"]["output"] == "another"
