"""The student while it is trained: a fused copy of the teacher's transformer in its engine, its velocity and its loss.

Axes: B = states, C, H, W = latent channels and size, P = width of the pooled text.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from teefusion.distillation import distillation_loss
from teefusion.engine import Engine
from teefusion.families import TextEmbeddings
from teefusion.fusion import Fusion, fuse, make_fusion, measure_sizes, pack
from teefusion.heldout import HeldOut
from teefusion.lora import make_trainable
from teefusion.manifests import Manifest
from teefusion.onpolicy import Velocity
from teefusion.settings import Settings
from teefusion.shards import read_tensors
from teefusion.storage import Reader
from teefusion.stream import States, read_null
from teefusion.teachers import load_transformer

_LEAST_MEASURED = 16  # guidance scales: of one prompt, that would be the least alone, where terms may be zero


class TrainingStudent:
    """Starts as the teacher; the engine takes it over. Measures the gaps of ``heldout`` before it is fused.

    Raises TeacherError, IntegrityError.
    """

    def __init__(
        self, settings: Settings, engine: Engine, manifest: Manifest, targets: Reader, heldout: HeldOut
    ) -> None:
        self.engine, self._weighting = engine, settings.train.loss_weighting
        transformer, self._family = load_transformer(settings.teacher)
        self._null_P = read_null(targets, manifest).pooled_BP[0].to(engine.device)
        self.fusion = _fusion(settings, transformer.time_text_embed, targets, manifest)
        stored = settings.student_steps == settings.strategy.num_steps
        self.gap_scale = heldout.measure_gaps(
            None if stored else functools.partial(self._conditional, transformer.to(engine.device))
        )
        engine.prepare(make_trainable(fuse(transformer, self.fusion), settings.train.lora_rank).train())

    def loss(self, states: States) -> Tensor:
        """Of a micro-batch, in the engine."""
        predicted = self.velocity(self.engine.model, states.x_BCHW, states.sigma_B, states.guidance_B, states.text)
        return distillation_loss(
            predicted, states.velocity_BCHW, states.gap_B, weighting=self._weighting, scale=self.gap_scale
        )

    def velocity(self, model: Any, x_BCHW: Tensor, sigma_B: Tensor, s_B: Tensor, text: TextEmbeddings) -> Tensor:
        """What ``model``, a transformer fused as the student's, gives at states, each with its own guidance."""
        packed, tokens_BTE = pack(text.pooled_BP, self._null_P, s_B), text.tokens_BTE.to(self.engine.input_dtype)
        return self._family.velocity(model, x_BCHW, sigma_B * 1000.0, tokens_BTE, packed)

    def sampled(self, model: Any) -> Velocity:
        """The same where no loss follows, in the precision of training."""

        def velocity(x_BCHW: Tensor, sigma_B: Tensor, s_B: Tensor, text: TextEmbeddings) -> Tensor:
            with self.engine.accelerator.autocast():
                return self.velocity(model, x_BCHW, sigma_B, s_B, text)

        return velocity

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Velocity]:
        """The velocity of the averaged weights. On every rank alike, as ZeRO 3 needs all of them in a forward."""
        model = self.engine.unwrapped
        with self.engine.averaged_weights():
            model.eval()
            yield self.sampled(model)
            model.train()

    def _conditional(self, transformer: Any, states: States) -> Tensor:
        """The teacher's conditional velocity [B, C, H, W], by its transformer before it is fused."""
        text = TextEmbeddings(*(part.float() for part in states.text))
        return self._family.velocity(transformer, states.x_BCHW, states.sigma_B * 1000.0, *text)


def _fusion(settings: Settings, stock: Any, targets: Reader, manifest: Manifest) -> Fusion:
    """The variant's constants; sizes are measured on the first block of training prompts."""
    block = read_tensors(targets, manifest.train.embeddings[0])
    pooled_BP, null_P = block["pooled"].float(), read_null(targets, manifest).pooled_BP[0].float()
    count = max(len(pooled_BP), _LEAST_MEASURED)
    pooled_BP = pooled_BP[torch.arange(count) % len(pooled_BP)]
    guidance_B = torch.linspace(settings.strategy.guidance_min, settings.strategy.guidance_max, count)
    options = settings.fusion
    convention, embedded = options.convention, settings.teacher.embedded_guidance
    sizes = measure_sizes(
        stock,
        pooled_BP,
        null_P,
        guidance_B,
        variant=options.variant,
        convention=convention,
        embedded_guidance=embedded,
    )
    return make_fusion(
        options.variant,
        convention=convention,
        term_rms=sizes["term_rms"],
        temb_rms=sizes["temb_rms"],
        embedded_guidance=embedded,
    )
