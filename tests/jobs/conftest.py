"""Fixtures of the tests of jobs: the API server's double, what was told, a run that finds the double."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from teefusion.settings import Settings
from tests.apiserver import ApiServer
from tests.jobs.plays import settings


@pytest.fixture
def server() -> Iterator[ApiServer]:
    with ApiServer() as found:
        yield found


@pytest.fixture(autouse=True)
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="teefusion")
    return caplog


@pytest.fixture
def shared(server: ApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Settings of a run on a shared volume at ``tmp_path``, with a way to the server."""
    config = str(server.kubeconfig(tmp_path / "config"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", config)
    run = settings(namespace=None, volume_path=str(tmp_path))
    return run.model_copy(update={"workdir": tmp_path / "work"})
