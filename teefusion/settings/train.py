"""The distillation loop."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from teefusion.settings.section import Section


class TrainSettings(Section):
    """The distillation loop."""

    steps: int = Field(default=10_000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(default=64, gt=0)
    """States an optimizer step, over all ranks and accumulation steps."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    """Micro-batches an optimizer step."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak of the schedule."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """After the warm-up."""
    warmup_steps: int = Field(default=100, ge=0)
    """Linear warm-up."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.99, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Of the averaged weights, which are the student; 0 turns averaging off."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps its states in 8 bits, by the library bitsandbytes; not with ZeRO."""
    lora_rank: int | None = Field(default=None, gt=0)
    """Trains updates of this rank of every linear layer (LoRA, by the library peft) instead of the weights; the student
    has them merged."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward passes; master weights are float32."""
    zero_stage: int = Field(default=0, ge=0, le=3)
    """DeepSpeed ZeRO: 0 is plain data parallel, 1 shares the optimizer's states among the ranks, 2 gradients too, 3
    weights too. The same steps are taken, but for rounding."""
    offload: bool = False
    """ZeRO: whether the optimizer's states (and at stage 3 the weights) lie in main memory."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass: a third more time, far less memory."""
    compile: bool = False
    """Whether the transformer is compiled (torch.compile)."""
    max_skipped_steps: int = Field(default=5, ge=0)
    """A step whose loss or gradient is not finite is skipped; more than so many in a row stop the run."""
    states: Literal["stored", "student"] = "stored"
    """`stored`: those of the target set. `student`: those that the student itself reaches from noise, with the teacher
    asked while training; its prompts and guidance scales are the target set's."""
    shuffle_mb: int = Field(default=1024, gt=0)
    """Stored states (MiB) a rank holds and shuffles together; as much again is read ahead."""
    loss_weighting: Literal["none", "guidance"] = "none"
    """`guidance` divides each sample's error by its mean squared guidance gap, so small scales count as large ones."""
    log_every: int = Field(default=10, gt=0)
    """Steps between logged losses."""
    eval_every: int = Field(default=500, gt=0)
    """Steps between guidance residuals on held-out states."""
    sample_every: int = Field(default=0, ge=0)
    """Steps between sheets of sample pictures; 0: one at the end alone."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, gt=0)
    seed: int = Field(default=0, ge=0)
    """Of the order of states."""
    num_processes: int = Field(default=1, gt=0)
    """Ranks on this machine; above 1 the stage runs under torchrun."""
    max_restarts: int = Field(default=3, ge=0)
    """torchrun: how often all ranks start again, from the last checkpoint, when one of them dies."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"max_restarts", "log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "num_processes"}
        | {"max_skipped_steps", "zero_stage", "offload", "gradient_checkpointing", "compile"}
    )

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload is ZeRO's: set zero_stage to 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _eight_bits_are_not_shared_out(self) -> Self:
        if self.optimizer == "adamw_8bit" and self.zero_stage:
            raise ValueError(
                "adamw_8bit and ZeRO do not go together, as its states cannot be put together for a checkpoint: set "
                "optimizer to adamw, or zero_stage to 0"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        ways = self.gradient_accumulation_steps * self.num_processes
        if self.batch_size % ways:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} x num_processes {self.num_processes} = {ways}"
            )
        return self
