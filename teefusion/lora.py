"""What of a student is trained: all of it, or a LoRA, which is merged into the weights when the student is exported."""

from __future__ import annotations

from typing import Any

from torch import nn

from teefusion.errors import TrainingError


def make_trainable(transformer: Any, lora_rank: int | None) -> Any:
    """Let all parameters be trained; with a rank, updates of that rank of every linear layer alone, zero at first.

    Raises TrainingError where a rank is given and peft is not installed.
    """
    transformer.requires_grad_(lora_rank is None)
    if lora_rank is None:
        return transformer
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise TrainingError(
            f"train.lora_rank is {lora_rank}, but peft is not installed. Run 'pip install teefusion[lora]', or leave "
            "train.lora_rank out."
        ) from error
    layers = [name for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)]
    transformer.add_adapter(LoraConfig(r=lora_rank, lora_alpha=lora_rank, target_modules=layers))
    return transformer


def merge_lora(transformer: Any) -> None:
    """Add the updates to the weights and take their layers away: names and shapes are as they were before."""
    transformer.fuse_lora()
    transformer.unload_lora()
