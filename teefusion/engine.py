"""The student in training, on any number of ranks: one optimizer step, averaged weights, whole weights.

Accelerate drives it, by itself or through DeepSpeed ZeRO. Under ZeRO a rank holds part of what the optimizer updates
(stage 1: its states and float32 weights; 2: gradients too; 3: the weights of the passes, too), and this module is the
only one that knows. DeepSpeed's own ``safe_get_full_fp32_param`` puts a weight together from all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, InitProcessGroupKwargs
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from teefusion.average import Average
from teefusion.devices import plain_attention
from teefusion.errors import TrainingError
from teefusion.settings import TrainSettings


class StepResult(NamedTuple):
    """What one optimizer step gives; tensors stay on the device."""

    loss: Tensor
    """Mean over ranks and micro-batches."""
    grad_norm: float
    finite: bool
    """Whether the step was taken: a loss or gradient that is not finite leaves the weights as they were."""


class Engine:
    """A model with its optimizer, learning rate schedule and average."""

    def __init__(self, options: TrainSettings, *, cpu: bool) -> None:
        self.options = options
        self.zero = options.zero_stage > 0
        # Told to take the CPU, Accelerate leaves DeepSpeed out; not told so, it needs the backend to find ranks there.
        gloo = self.zero and not torch.cuda.is_available()
        self.accelerator = Accelerator(
            cpu=cpu and not self.zero,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if gloo else None,
            mixed_precision="bf16" if options.precision == "bfloat16" else "no",
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            deepspeed_plugin=_plugin(options) if self.zero else None,
        )
        self.device = self.accelerator.device
        # ZeRO keeps the weights of the passes in bfloat16; otherwise they are float32 and autocast does the rest.
        self.input_dtype = torch.bfloat16 if self.zero and options.precision == "bfloat16" else torch.float32

    def prepare(self, model: Any) -> None:
        """Take a float32 model on the CPU. Only the student is in here: nothing frozen is ever sharded."""
        options = self.options
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        base = _optimizer(options, model.parameters())
        # Built on the optimizer that ZeRO wraps: they share the groups that hold the rate.
        self.schedule = get_scheduler(
            "constant_with_warmup" if options.lr_schedule == "constant" else options.lr_schedule,
            base,
            num_warmup_steps=options.warmup_steps,
            num_training_steps=options.steps,
        )
        if self.zero:
            micro = options.batch_size // (self.accelerator.num_processes * options.gradient_accumulation_steps)
            self.accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro
        self.model, self.optimizer = self.accelerator.prepare(model, base)
        if self.zero:
            # Accelerate tells transformers of ZeRO, which then shards every model that it loads. Ours are whole.
            unset_hf_deepspeed_config()
        if options.compile:
            self.unwrapped.compile()
        self.average = Average(self._masters(), options.ema_decay) if options.ema_decay else None
        self.accelerator.register_for_checkpointing(self.schedule)

    @property
    def unwrapped(self) -> Any:
        """The model itself. Under ZeRO 3 every rank has to call it when one does."""
        return self.accelerator.unwrap_model(self.model)

    def step(self, losses: Sequence[Callable[[], Tensor]]) -> StepResult:
        """One optimizer step over micro-batches, each a function that gives its loss.

        Raises TrainingError under ZeRO for a later micro-batch whose loss is not finite: DeepSpeed cannot take back the
        gradients of those before it.
        """
        taken, norm, finite = [], 0.0, True
        for loss_of in losses:
            with self.accelerator.accumulate(self.model), self._attention():
                loss = loss_of()
                taken.append(loss.detach())
                finite = finite and self._all_finite(loss)
                if not finite and not self.zero:
                    continue
                if not finite and len(taken) > 1:
                    raise TrainingError(
                        "The loss of a micro-batch is not finite, and DeepSpeed cannot leave out a step that it has "
                        "begun. The last checkpoint is good; lower train.learning_rate and run again."
                    )
                if not finite:
                    break  # before DeepSpeed has seen it: its engine steps inside backward
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.options.max_grad_norm))
                    finite = norm < float("inf")  # false for NaN, too
                    if finite:
                        self.optimizer.step()
        if finite or not self.zero:
            self.optimizer.zero_grad()
        self.schedule.step()
        if finite and self.average:
            self.average.step(self._masters())
        mean = self.accelerator.reduce(torch.stack(taken).mean(), "mean")
        return StepResult(mean, norm, finite)

    def learning_rate(self) -> float:
        """Of the next step."""
        return float(self.schedule.get_last_lr()[0])

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """The student is its averaged weights; the raw ones come back after the block. Every rank has to enter."""
        if not self.average:
            yield
            return
        masters = self._masters()
        self.average.swap_in(masters)
        self._publish()
        try:
            yield
        finally:
            self.average.swap_out(masters)
            self._publish()

    def save(self, folder: Path) -> None:
        """Write everything that training goes on from into an existing folder; every rank has to."""
        self.accelerator.save_state(str(folder))
        if self.average and (self.zero or self.accelerator.is_main_process):
            save_file(self.average.state(), folder / self._average_file)

    def load(self, folder: Path) -> None:
        """Go on from what ``save`` wrote. Under ZeRO by as many ranks, at the same stage."""
        self.accelerator.load_state(str(folder))
        if self.average:
            self.average.load(load_file(folder / self._average_file))

    @property
    def layout(self) -> dict[str, int]:
        """What ``load`` needs to be as it was at ``save``."""
        return {"zero_stage": self.options.zero_stage, "ranks": self.accelerator.num_processes if self.zero else 0}

    @property
    def _average_file(self) -> str:
        """Each rank's own where it averages a part, else that of all."""
        return f"average-{self.accelerator.process_index if self.zero else 0}.safetensors"

    @torch.no_grad()
    def whole_weights(self) -> dict[str, Tensor]:
        """Every parameter in float32 on the CPU, put together from all ranks; every rank has to ask."""
        weights = self.unwrapped.named_parameters()
        # Copied, as the weights themselves go on changing.
        return {name: self._full(weight).to("cpu", torch.float32, copy=True) for name, weight in weights}

    def _full(self, weight: Tensor) -> Tensor:
        if not self.zero:
            return weight
        from deepspeed.utils import safe_get_full_fp32_param

        full: Tensor = safe_get_full_fp32_param(weight)
        return full.view(_shape(weight))

    def _masters(self) -> list[Tensor]:
        """What the optimizer updates, as far as this rank holds it."""
        if not self.zero:
            return list(self.unwrapped.parameters())
        wrapped = self.model.optimizer
        if self.options.zero_stage == 3:
            return list(wrapped.fp32_partitioned_groups_flat)
        return list(wrapped.single_partition_of_fp32_groups)

    @torch.no_grad()
    def _publish(self) -> None:
        """Under ZeRO, bring what the optimizer holds into the weights of the passes."""
        if not self.zero:
            return
        import deepspeed

        for weight in self.unwrapped.parameters():
            full = self._full(weight)
            if self.options.zero_stage < 3:
                weight.data.copy_(full)
                continue
            with deepspeed.zero.GatheredParameters([weight], modifier_rank=0):
                weight.data.copy_(full)

    def _all_finite(self, loss: Tensor) -> bool:
        """On every rank: they step together or not at all."""
        bad = (~torch.isfinite(loss.detach())).float()
        return float(self.accelerator.reduce(bad, "sum")) == 0

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        return plain_attention() if self.device.type == "cpu" else contextlib.nullcontext()


def _shape(weight: Any) -> Sequence[int]:
    """Of the whole weight: under ZeRO 3 the tensor itself is empty."""
    return getattr(weight, "ds_shape", weight.shape)  # type: ignore[no-any-return]


def _optimizer(options: TrainSettings, weights: Any) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit version. Raises TrainingError where that one's library is not installed."""
    values: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.weight_decay,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(weights, **values)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError(
            "train.optimizer adamw_8bit needs the library bitsandbytes, which is not installed. Run "
            "'pip install teefusion[adamw-8bit]', or set train.optimizer=adamw."
        ) from error
    return AdamW8bit(weights, **values)  # type: ignore[no-any-return]


def _plugin(options: TrainSettings) -> DeepSpeedPlugin:
    """ZeRO as the settings say. Raises TrainingError where DeepSpeed is not installed."""
    device = "cpu" if options.offload else "none"
    try:
        return DeepSpeedPlugin(
            zero_stage=options.zero_stage,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            gradient_clipping=options.max_grad_norm,
            offload_optimizer_device=device,
            offload_param_device=device if options.zero_stage == 3 else "none",
            zero3_init_flag=False,
        )
    except ImportError as error:
        raise TrainingError(
            f"train.zero_stage is {options.zero_stage}, but DeepSpeed is not installed. Run 'make deepspeed' (or "
            "pip install 'teefusion[deepspeed]' --no-build-isolation), or set train.zero_stage=0."
        ) from error
