"""The report a person looks at: one HTML file that needs nothing else, understood in a minute."""

from teefusion.report.data import (
    COLORS,
    ControlPoint,
    Pairing,
    PictureSet,
    ReportData,
    ResidualBucket,
    Row,
    SigmaBucket,
    StageTime,
    SweptPictures,
    Timing,
)
from teefusion.report.page import render_report

__all__ = [
    "COLORS",
    "ControlPoint",
    "Pairing",
    "PictureSet",
    "ReportData",
    "ResidualBucket",
    "Row",
    "SigmaBucket",
    "StageTime",
    "SweptPictures",
    "Timing",
    "render_report",
]
