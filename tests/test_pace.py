"""The pace of training, worked out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from teefusion import pace
from teefusion.pace import Pace
from teefusion.settings import Settings

Make = Callable[..., Settings]


def test_rates_are_of_the_time_since_they_were_asked_for(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(pace, "_state_share", lambda *_: 0.1)  # of a device's second
    counted = Pace(make_settings(), torch.device("cpu"), ranks=2)
    counted.take(8, 0.5)
    counted.take(8, 0.5)
    now[0] += 4
    expected = {"train/states_per_second": 4.0, "train/data_wait_share": 0.25, "train/mfu": 0.2}
    assert counted.metrics() == pytest.approx(expected)
    now[0] += 2
    assert set(counted.metrics().values()) == {0.0}
    assert counted.waited == 1.0


def test_no_utilisation_is_told_of_a_device_whose_peak_is_unknown(make_settings: Make) -> None:
    assert "train/mfu" not in Pace(make_settings(), torch.device("cpu"), ranks=1).metrics()
