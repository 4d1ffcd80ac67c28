"""What training tells of itself: where it stands, metrics for MLflow, and the record beside the student."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from teefusion.distillation import ResidualMeter
from teefusion.engine import StepResult

RESULT = "training.json"


@dataclasses.dataclass
class Position:
    """Where training stands; saved with each checkpoint."""

    step: int = 0
    curve: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    """Guidance residuals by step."""
    losses: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    skipped: int = 0


def loss_metrics(position: Position, result: StepResult, learning_rate: float) -> dict[str, float]:
    """Of the last step."""
    return {
        "train/loss": float(result.loss),
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": learning_rate,
        "train/skipped_steps": float(position.skipped),
    }


def residual_metrics(meter: ResidualMeter) -> dict[str, float]:
    """Over all held-out states, and by guidance scale and sigma."""
    metrics = {"heldout/guidance_residual": meter.overall}
    for kind, buckets in (("s", meter.by_guidance()), ("sigma", meter.by_sigma())):
        metrics |= {f"heldout/residual_{kind}_{b['low']:.2f}_{b['high']:.2f}": b["residual"] for b in buckets}
    return metrics


def training_record(position: Position, meter: ResidualMeter) -> dict[str, Any]:
    """What was learned, and how long it took; JSON-ready."""
    return {
        "guidance_residual": meter.overall,
        "residual_by_guidance": meter.by_guidance(),
        "residual_by_sigma": meter.by_sigma(),
        "residual_by_sigma_and_guidance": meter.by_sigma_and_guidance(),
        "residual_curve": [(step, value) for step, value in position.curve if math.isfinite(value)],
        "loss_curve": position.losses,
        "steps": position.step,
        "skipped_steps": position.skipped,
        "seconds": round(position.seconds, 3),
    }
