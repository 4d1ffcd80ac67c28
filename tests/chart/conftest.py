"""Every case, rendered once."""

from __future__ import annotations

import pytest

from tests.charts import CASES, Release, render


@pytest.fixture(scope="session")
def releases() -> dict[str, Release]:
    """Each case, rendered once by Helm 4."""
    return {name: render(values) for name, values in CASES.items()}


@pytest.fixture(params=CASES)
def release(request: pytest.FixtureRequest, releases: dict[str, Release]) -> Release:
    return releases[request.param]
