"""The pieces of the paper's formula in float64, from weights alone: what fused conditionings are held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def psi(value: float) -> Tensor:
    """The sinusoid of 256 channels, cosines first."""
    frequency = torch.exp(-math.log(10_000) * torch.arange(128, dtype=torch.float64) / 128)
    return torch.cat([torch.cos(value * frequency), torch.sin(value * frequency)])


def mlps(state: Mapping[str, Tensor]) -> Callable[[str, Tensor], Tensor]:
    """``mlp(name, x)``: Linear, SiLU, Linear of the module called ``name`` in a state dict."""
    w = {name: value.double() for name, value in state.items()}

    def mlp(name: str, x: Tensor) -> Tensor:
        hidden = w[f"{name}.linear_1.weight"] @ x + w[f"{name}.linear_1.bias"]
        return w[f"{name}.linear_2.weight"] @ (hidden * torch.sigmoid(hidden)) + w[f"{name}.linear_2.bias"]

    return mlp
