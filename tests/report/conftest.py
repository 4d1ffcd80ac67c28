"""The page of the full report, rendered once."""

from __future__ import annotations

import pytest

from teefusion.report import render_report
from tests.reports import Page, report_data


@pytest.fixture(scope="session")
def html() -> str:
    return render_report(report_data())


@pytest.fixture(scope="session")
def page(html: str) -> Page:
    return Page(html)
