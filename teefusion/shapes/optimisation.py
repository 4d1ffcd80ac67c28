"""How every part is trained: AdamW, clipped gradients, a short warm-up, then half a cosine down to zero."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Optimizer:
    """AdamW over ``steps`` steps that reaches ``learning_rate`` after the first 5 % (at most 200) and ends at zero."""

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, learning_rate: float, steps: int, weight_decay: float = 0.0
    ) -> None:
        self._parameters = list(parameters)
        self._adamw = torch.optim.AdamW(
            self._parameters, lr=learning_rate, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True
        )
        warmup = max(1, min(200, steps // 20))

        def share(step: int) -> float:
            rest = (step - warmup) / max(1, steps - warmup)
            return (step + 1) / (warmup + 1) if step < warmup else 0.5 + 0.5 * math.cos(math.pi * rest)

        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._adamw, share)

    def step(self, loss: Tensor) -> None:
        """One update along the gradient of ``loss``."""
        self._adamw.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._adamw.step()
        self._schedule.step()
