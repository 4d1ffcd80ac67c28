"""The student in training, on any number of ranks: one optimizer step, averaged weights, whole weights.

Accelerate drives it, by itself or through DeepSpeed ZeRO (``zero.py``), under which a rank holds part of what the
optimizer updates. What leaves this module is whole, and the same however it was shared out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs
from diffusers.optimization import get_scheduler
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from teefusion import zero
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
        shared = DistributedDataParallelKwargs(
            gradient_as_bucket_view=True
        )  # plain ranks have gradients once, not twice
        self.accelerator = Accelerator(
            cpu=cpu and not self.zero,
            kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if gloo else [shared],
            mixed_precision="bf16" if options.precision == "bfloat16" else "no",
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            deepspeed_plugin=zero.zero_plugin(options) if self.zero else None,
        )
        self.device = self.accelerator.device
        # ZeRO keeps the weights of the passes in bfloat16; otherwise they are float32 and autocast does the rest.
        self.input_dtype = torch.bfloat16 if self.zero and options.precision == "bfloat16" else torch.float32

    def prepare(self, model: Any) -> None:
        """Take a float32 model on the CPU, of which what requires a gradient is trained. No teacher is in here."""
        options = self.options
        if options.gradient_checkpointing:
            model.enable_gradient_checkpointing()
        base = _optimizer(options, [weight for weight in model.parameters() if weight.requires_grad])
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
        try:
            with self.average.in_place_of(self._masters()):
                self._publish()
                yield
        finally:
            self._publish()

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """What training goes on from, by name: whole float32 weights, their optimizer states, their averages.

        The same at every ZeRO stage, on any number of ranks. Every rank has to take all of them; each is good until
        the next is taken.
        """
        for name, weight in self._trained():
            yield f"weight.{name}", self._whole(weight)
            for key in self._state_keys(weight):
                yield f"{key}.{name}", self._whole(weight, key)
        if self.average:
            with self.average.in_place_of(self._masters()):
                for name, weight in self._trained():
                    yield f"average.{name}", self._whole(weight)

    def counters(self) -> dict[str, Any]:
        """What training goes on from beside ``tensors``; JSON-ready."""
        steps = [int(state["step"]) for state in self._adam.state.values()]
        return {
            "optimizer_steps": max(steps, default=0),
            "average_steps": self.average.steps if self.average else 0,
            "schedule": self.schedule.state_dict(),
        }

    @torch.no_grad()
    def restore(self, tensor: Callable[[str], Tensor], counters: Mapping[str, Any]) -> None:
        """Go on from the ``tensors``, each asked for by its name, and the ``counters`` of an engine of any layout."""
        if counters["optimizer_steps"]:
            self._make_states(counters["optimizer_steps"])
        if self.average:
            for name, weight in self._trained():
                self._put(weight, tensor(f"average.{name}"))
            self.average.load(self._masters(), counters["average_steps"])
        for name, weight in self._trained():
            self._put(weight, tensor(f"weight.{name}"))
            for key in self._state_keys(weight):
                self._put(weight, tensor(f"{key}.{name}"), key)
        self._publish()
        self.schedule.load_state_dict(dict(counters["schedule"]))
        for group in self._adam.param_groups:
            group["lr"] = self.learning_rate()

    @torch.no_grad()
    def whole_weights(self) -> dict[str, Tensor]:
        """Every trained parameter in float32 on the CPU, put together from all ranks; every rank has to ask."""
        # Copied, as the weights themselves go on changing.
        return {name: self._whole(weight).to("cpu", torch.float32, copy=True) for name, weight in self._trained()}

    def _trained(self) -> list[tuple[str, Tensor]]:
        return [(name, weight) for name, weight in self.unwrapped.named_parameters() if weight.requires_grad]

    @property
    def _adam(self) -> Any:
        """The optimizer itself; under ZeRO that of this rank's part."""
        return self.model.optimizer.optimizer if self.zero else self.optimizer.optimizer

    def _masters(self) -> list[Tensor]:
        """What the optimizer updates, as far as this rank holds it."""
        return zero.masters(self.model.optimizer) if self.zero else [weight for _, weight in self._trained()]

    def _whole(self, weight: Tensor, key: str | None = None) -> Tensor:
        """The float32 weight, or its optimizer state of that name."""
        if self.zero:
            return zero.whole(weight, key)
        return self._adam.state[weight][key] if key else weight.detach()

    def _put(self, weight: Tensor, value: Tensor, key: str | None = None) -> None:
        if self.zero:
            zero.put(weight, value, key)
        else:
            self._whole(weight, key).copy_(value)

    def _publish(self) -> None:
        """Bring what the optimizer holds into the weights of the passes, where those are others."""
        if self.zero:
            zero.publish(weight for _, weight in self._trained())

    def _state_keys(self, weight: Tensor) -> Sequence[str]:
        """Names of the optimizer's tensors of a weight; none before its first step."""
        if self.zero:
            return zero.STATE_KEYS if self._adam.state else ()
        state = self._adam.state.get(weight, {})
        return [key for key, value in state.items() if torch.is_tensor(value) and value.ndim]

    def _make_states(self, steps: int) -> None:
        """Let the optimizer make its states, which it does in a step; the weights are to be put after it."""
        adam, masters = self._adam, self._masters()
        (group,), grads = adam.param_groups, [master.grad for master in masters]
        listed, group["params"] = group["params"], masters  # at stage 3 DeepSpeed lists them only while it steps
        for master in masters:
            master.grad = torch.zeros_like(master)
        adam.step()
        group["params"] = listed
        for master, grad in zip(masters, grads, strict=True):
            master.grad = grad
            step = adam.state[master]["step"]
            adam.state[master]["step"] = torch.full_like(step, steps) if torch.is_tensor(step) else steps
        if self.zero:
            zero.link_states(self.model.optimizer)

    def _all_finite(self, loss: Tensor) -> bool:
        """On every rank: they step together or not at all."""
        bad = (~torch.isfinite(loss.detach())).float()
        return float(self.accelerator.reduce(bad, "sum")) == 0

    def _attention(self) -> contextlib.AbstractContextManager[None]:
        return plain_attention() if self.device.type == "cpu" else contextlib.nullcontext()


def _optimizer(options: TrainSettings, weights: Sequence[Tensor]) -> torch.optim.Optimizer:
    """AdamW, or its 8-bit version. Raises TrainingError where that one's library is not installed."""
    values: dict[str, Any] = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.weight_decay,
    }
    if options.optimizer == "adamw":
        return torch.optim.AdamW(weights, fused=True, **values)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise TrainingError(
            "train.optimizer adamw_8bit needs the library bitsandbytes, which is not installed. Run "
            "'pip install teefusion[adamw-8bit]', or set train.optimizer=adamw."
        ) from error
    return AdamW8bit(weights, **values)  # type: ignore[no-any-return]
