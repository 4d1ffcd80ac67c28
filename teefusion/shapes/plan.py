"""What determines the weights of the bundled teacher and its arbiter. Imports no torch, so that help is instant."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Plan:
    """Settings of one training. One plan, on one machine type and torch version, gives one set of weights."""

    seed: int = 0
    threads: int = 2
    """Of torch. Part of the plan because sums over threads are taken in an order that depends on their number."""
    pictures: int = 20_000
    """Drawings held in memory; they go through the training scenes again and again."""
    steps_autoencoder: int = 2_400
    batch_autoencoder: int = 24
    steps_scorer: int = 2_500
    steps_scorer_again: int = 1_000
    """After those, from a high learning rate once more: one descent tells only 93 % of shapes from wrong ones."""
    batch_scorer: int = 64
    steps_denoiser: int = 8_000
    batch_denoiser: int = 64
    learning_rate: float = 1.5e-3
    """Of the denoiser, at its highest."""
    layers: int = 4
    width: int = 128
    measured_scenes: int = 231
    """Held-out scenes that everything is measured on, at most all 231."""

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value <= 0 and name != "seed":
                raise ValueError(f"{name} is {value}, and must be positive. Correct --{name.replace('_', '-')}.")
        if self.width % 32:
            raise ValueError(f"width is {self.width}, and must be a multiple of 32, the width of one attention head.")
