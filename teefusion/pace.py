"""How fast training goes: states a second, the share of time that waits for data, and model FLOP utilisation."""

from __future__ import annotations

import time

import torch

from teefusion.architectures import teacher_shape
from teefusion.estimates import device_reported_as
from teefusion.settings import Settings


class Pace:
    """Counts what was trained on, and the seconds in which nothing was there to train on."""

    def __init__(self, settings: Settings, device: torch.device, ranks: int) -> None:
        self._state_share = _state_share(settings, device) / ranks
        self._states = 0
        self._waited = self.waited = 0.0
        self._since = time.monotonic()

    def take(self, states: int, waited: float) -> None:
        """So many states of the global batch, after waiting so long (seconds) for this rank's."""
        self._states += states
        self._waited += waited
        self.waited += waited

    def metrics(self) -> dict[str, float]:
        """Since they were asked for last. What is measured and saved in between takes its time, too."""
        seconds = max(time.monotonic() - self._since, 1e-9)
        rate = self._states / seconds
        metrics = {"train/states_per_second": rate, "train/data_wait_share": self._waited / seconds}
        if self._state_share:
            metrics["train/mfu"] = rate * self._state_share
        self._states, self._waited, self._since = 0, 0.0, time.monotonic()
        return metrics


def _state_share(settings: Settings, device: torch.device) -> float:
    """Share of a second that a state's products take at the device's peak; 0 where that is not known.

    A backward pass makes two products for each of the forward's, or one where the weights get no gradient (LoRA); what
    gradient checkpointing computes again is no work of the model's.
    """
    known = device_reported_as(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if known is None:
        return 0.0
    return (2 if settings.train.lora_rank else 3) * teacher_shape(settings.teacher).forward_flops / known.peak_flops
