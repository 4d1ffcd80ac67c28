"""DeepSpeed ZeRO: what a rank holds of weights and optimizer states, and whole tensors put together from all ranks.

Stage 1 shares out the optimizer's states and float32 weights, 2 gradients too, 3 the weights of the passes, too. The
float32 weights lie in a few flat tensors, ``masters``, with zeros at their ends.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate.utils import DeepSpeedPlugin, is_deepspeed_available
from torch import Tensor

from teefusion.errors import TrainingError
from teefusion.settings import TrainSettings

STATE_KEYS = ("exp_avg", "exp_avg_sq")
"""Adam's, by which DeepSpeed finds the part of a weight."""


def require_deepspeed(options: TrainSettings) -> None:
    """Raise TrainingError where the settings want ZeRO and DeepSpeed is not installed."""
    if options.zero_stage and not is_deepspeed_available():
        raise TrainingError(
            f"train.zero_stage is {options.zero_stage}, but DeepSpeed is not installed. Run 'make deepspeed' (or "
            "pip install 'teefusion[deepspeed]' --no-build-isolation), or set train.zero_stage=0."
        )


def zero_plugin(options: TrainSettings) -> DeepSpeedPlugin:
    """ZeRO as the settings say. Raises what ``require_deepspeed`` raises."""
    require_deepspeed(options)
    device = "cpu" if options.offload else "none"
    return DeepSpeedPlugin(
        zero_stage=options.zero_stage,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        gradient_clipping=options.max_grad_norm,
        offload_optimizer_device=device,
        offload_param_device=device if options.zero_stage == 3 else "none",
        zero3_init_flag=False,
    )


def masters(wrapped: Any) -> list[Tensor]:
    """The float32 weights that this rank's part of DeepSpeed's optimizer updates."""
    stage3 = hasattr(wrapped, "fp32_partitioned_groups_flat")
    return list(wrapped.fp32_partitioned_groups_flat if stage3 else wrapped.single_partition_of_fp32_groups)


def whole(weight: Any, key: str | None = None) -> Tensor:
    """A weight in float32, or one of its optimizer states, from all ranks; every rank has to ask."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    full = safe_get_full_optimizer_state(weight, key) if key else safe_get_full_fp32_param(weight)
    return full.view(getattr(weight, "ds_shape", weight.shape))  # type: ignore[no-any-return]  # at stage 3 it is empty


def put(weight: Any, value: Tensor, key: str | None = None) -> None:
    """Keep this rank's part of a whole weight, or of an optimizer state. The weights of the passes stay as they are."""
    from deepspeed import utils

    if not hasattr(weight, "ds_id"):  # below stage 3
        if key:
            utils.safe_set_full_optimizer_state(weight, value, key)
        else:
            utils.safe_set_full_fp32_param(weight, value)
        return
    # DeepSpeed's setter of whole values reads past the end of one that does not divide among the ranks.
    part, rank = weight.ds_tensor.numel(), torch.distributed.get_rank()
    flat = value.flatten()[rank * part : (rank + 1) * part]
    flat = torch.nn.functional.pad(flat, (0, part - len(flat)))
    if key:
        utils.safe_set_local_optimizer_state(weight, flat, key)
    else:
        utils.safe_set_local_fp32_param(weight, flat)


def publish(weights: Iterable[Any]) -> None:
    """Bring the masters into the weights of the passes; every rank has to."""
    import deepspeed

    for weight in weights:
        full = whole(weight)
        if not hasattr(weight, "ds_id"):
            weight.data.copy_(full)
            continue
        with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
            weight.data.copy_(full)


def link_states(wrapped: Any) -> None:
    """Tell DeepSpeed that the optimizer has states now; it does so itself in its first step."""
    if hasattr(wrapped, "_lazy_init_hp_params_optimizer_state"):  # stage 3 looks them up each time
        wrapped._lazy_init_hp_params_optimizer_state()
