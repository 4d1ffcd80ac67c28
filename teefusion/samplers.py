"""What a comparison compares: teachers and students, drawing from the same prompts and noise, counted and timed.

Rows of an evaluation are ``unguided`` (teacher at s = 1), ``teacher`` (by its strategy), ``student``, ``champion``
where there is one, and for a reflective strategy ``cfg`` and ``cfg_matched``: the plain teacher at the same s, and at
the strategy's effective guidance, so that a gain is not just more guidance.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL.Image import Image

from teefusion.memory import peak_bytes, reset_peak
from teefusion.prompts import Prompt
from teefusion.sampling import sample
from teefusion.settings import EvaluateSettings, Settings
from teefusion.strategies import TEACHER, effective_guidance, make_strategy
from teefusion.teachers import Teacher

Draw = Callable[[list[str], float, list[torch.Generator]], list[Image]]
"""Pictures of prompts at a guidance scale, one generator of noise each."""


@dataclass
class Sampler:
    """One row of a comparison: draws at one guidance scale, and counts transformer forwards, seconds and memory.

    Seconds include text encoding and decoding; memory all that is loaded, of other rows too.
    """

    draw: Draw
    transformers: Sequence[torch.nn.Module]
    guidance_scale: float
    seed: int
    device: str = "cpu"
    seconds: list[float] = field(default_factory=list)
    pictures: int = 0
    forwards: int = 0
    peak_bytes: int = 0

    def __call__(self, prompts: Sequence[Prompt]) -> list[Image]:
        """One picture a prompt; the noise depends on seed and prompt alone."""
        generators = [torch.Generator().manual_seed(_noise_seed(self.seed, prompt)) for prompt in prompts]
        hooks = [transformer.register_forward_hook(self._count) for transformer in self.transformers]
        self._synchronize()
        reset_peak(self.device)
        started = time.perf_counter()
        try:
            images = self.draw([prompt.text for prompt in prompts], self.guidance_scale, generators)
        finally:
            for hook in hooks:
                hook.remove()
        self._synchronize()
        self.seconds.append((time.perf_counter() - started) / len(prompts))
        self.peak_bytes = max(self.peak_bytes, peak_bytes(self.device))
        self.pictures += len(prompts)
        return images

    def at(self, *, guidance_scale: float | None = None, seed: int | None = None) -> Sampler:
        """The same row at another scale, or from other noise; it counts on its own."""
        scale = self.guidance_scale if guidance_scale is None else guidance_scale
        return Sampler(self.draw, self.transformers, scale, self.seed if seed is None else seed, self.device)

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        """A call that is not counted: the first one pays for allocation and kernels' selection."""
        self(prompts)
        self.start_counting()

    def start_counting(self) -> None:
        """Forget what was counted."""
        self.seconds.clear()
        self.pictures = self.forwards = self.peak_bytes = 0

    def count(self, pictures: int, seconds: float, forwards: int, peak_bytes: int) -> None:
        """Count a batch, whoever drew it; ``seconds`` a picture."""
        self.seconds.append(seconds)
        self.pictures += pictures
        self.forwards += forwards
        self.peak_bytes = max(self.peak_bytes, peak_bytes)

    @property
    def nfe(self) -> float:
        """Transformer forwards a picture; two branches in one batch count two."""
        return self.forwards / self.pictures

    def timing(self) -> dict[str, float]:
        """Median, least and greatest seconds a picture over the batches."""
        return {"median": statistics.median(self.seconds), "min": min(self.seconds), "max": max(self.seconds)}

    def _count(self, module: Any, arguments: Any, output: tuple[torch.Tensor]) -> None:
        self.forwards += output[0].shape[0]

    def _synchronize(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)


def samplers(settings: Settings, teacher: Teacher, student: Any, champion: Any = None) -> dict[str, Sampler]:
    """The rows of an evaluation, in the order in which they are shown."""
    options, s = settings.evaluate, settings.evaluate.guidance_scale
    steps = options.num_steps or settings.strategy.num_steps
    rows = {"unguided": teacher_sampler(teacher, options, steps, guidance_scale=1.0)}
    if settings.strategy.name == "euler_cfg":
        rows["teacher"] = teacher_sampler(teacher, options, steps)
    else:
        matched = effective_guidance(settings.strategy, s)
        rows["cfg"] = teacher_sampler(teacher, options, steps)
        rows["cfg_matched"] = teacher_sampler(teacher, options, steps, guidance_scale=matched)
        rows["teacher"] = strategy_sampler(teacher, settings, steps)
    rows["student"] = student_sampler(student, options, steps, like=teacher)
    if champion is not None:
        rows["champion"] = student_sampler(champion, options, steps, like=teacher)
    return rows


def teacher_sampler(
    teacher: Teacher, options: EvaluateSettings, num_steps: int, *, guidance_scale: float | None = None
) -> Sampler:
    """A teacher by its stock pipeline, with plain classifier-free guidance; none at s = 1."""

    def draw(prompts: list[str], s: float, generators: list[torch.Generator]) -> list[Image]:
        teacher.transformer_on(TEACHER)  # switches a strategy's LoRA off
        guidance = teacher.family.guidance_options(s, len(prompts))
        result = teacher.pipeline(
            prompts, generator=generators, num_inference_steps=num_steps, **guidance, **_picture(teacher)
        )
        return result.images  # type: ignore[no-any-return]

    scale = options.guidance_scale if guidance_scale is None else guidance_scale
    return Sampler(draw, [teacher.pipeline.transformer], scale, options.seed, teacher.device)


def strategy_sampler(teacher: Teacher, settings: Settings, num_steps: int) -> Sampler:
    """A teacher by the settings' strategy."""
    strategy = make_strategy(settings.strategy)

    def draw(prompts: list[str], s: float, generators: list[torch.Generator]) -> list[Image]:
        images: list[Image] = sample(
            teacher, strategy, prompts, guidance_scale=s, num_steps=num_steps, generators=generators
        )
        return images

    transformers = [model for model in (teacher.pipeline.transformer, teacher.second) if model is not None]
    options = settings.evaluate
    return Sampler(draw, transformers, options.guidance_scale, options.seed, teacher.device)


def student_sampler(student: Any, options: EvaluateSettings, num_steps: int, *, like: Teacher | None = None) -> Sampler:
    """A student in its own number of steps, else in ``num_steps``; its pictures are as large as the teacher's."""
    steps = len(student.config.sigmas) if student.config.get("sigmas") else num_steps
    picture = {} if like is None else _picture(like)

    def draw(prompts: list[str], s: float, generators: list[torch.Generator]) -> list[Image]:
        result = student(prompts, guidance_scale=s, generator=generators, num_inference_steps=steps, **picture)
        return result.images  # type: ignore[no-any-return]

    return Sampler(draw, [student.transformer], options.guidance_scale, options.seed, str(student.device))


def _picture(teacher: Teacher) -> dict[str, Any]:
    settings = teacher.settings
    return {
        "height": settings.height,
        "width": settings.width,
        "max_sequence_length": settings.max_sequence_length,
    }


def _noise_seed(seed: int, prompt: Prompt) -> int:
    digest = hashlib.sha256(f"{seed}/{prompt.digest}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch seeds are signed
