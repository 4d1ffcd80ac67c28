"""From a plan to the published folders, part by part: drawings, autoencoder, arbiter, denoiser, measures.

    OUTPUT/parts/<part>/     finished parts, each with the plan it was made by; an interrupted build goes on from them
    OUTPUT/preview/          the teacher as it is, every so many steps, where asked for
    OUTPUT/scorer/  teacher/  training.json     the result; training.json comes last

A folder appears when it is whole, so nothing unfinished looks finished.
"""

from __future__ import annotations

import logging
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from transformers import CLIPModel, CLIPTokenizer

from teefusion.errors import TrainingError
from teefusion.files import publish_folder, read_json, write_json
from teefusion.shapes.arbiter import make_arbiter, train_arbiter
from teefusion.shapes.autoencoder import encode, train_autoencoder
from teefusion.shapes.corpus import Pool, make_pool, make_tokenizer, split_scenes
from teefusion.shapes.denoiser import make_denoiser, train_denoiser
from teefusion.shapes.folders import load_pipeline, make_pipeline, save_model, save_scorer
from teefusion.shapes.measures import heldout_pool, measure_arbiter, measure_autoencoder, measure_guidance
from teefusion.shapes.plan import Plan

log = logging.getLogger(__name__)

_MADE = "made.json"  # in each part: the plan it was made by, and the seconds it took


def build(output: Path, plan: Plan, *, preview_every: int = 0) -> dict[str, Any]:
    """Train what is missing, publish the folders and return the facts in training.json. Raises TrainingError."""
    torch.set_num_threads(plan.threads)
    for library in (diffusers.utils.logging, transformers.utils.logging):
        library.disable_progress_bar()  # theirs, of loading and saving; ours stays
    parts = _Parts(output / "parts", plan)
    tokenizer = make_tokenizer()
    scenes, heldout = split_scenes()
    pool = cache(lambda: make_pool(scenes, plan.pictures, plan.seed))  # a minute: drawn only if a part is missing

    autoencoder = _autoencoder(parts, pool)
    arbiter = _arbiter(parts, pool, tokenizer, autoencoder)
    with publish_folder(output / "scorer") as folder:
        save_scorer(folder, arbiter, tokenizer)
    part = _teacher(parts, pool, tokenizer, autoencoder, preview=output / "preview", preview_every=preview_every)
    with publish_folder(output / "teacher") as folder:
        shutil.copytree(part, folder, ignore=shutil.ignore_patterns(_MADE), dirs_exist_ok=True)
    teacher = load_pipeline(output / "teacher")

    heldout = heldout[: plan.measured_scenes]
    drawn = heldout_pool(heldout)
    facts = {
        "plan": asdict(plan),
        "seconds": parts.seconds,
        "parameters": _parameters(teacher) | {"scorer": _count(arbiter)},
        "autoencoder": measure_autoencoder(autoencoder, drawn),
        "pairwise_accuracy": measure_arbiter(arbiter, tokenizer, autoencoder, drawn),
        "guidance": measure_guidance(teacher, output / "scorer", [scene.caption for scene in heldout]),
        "versions": _versions(),
    }
    write_json(output / "training.json", facts)
    return facts


class _Parts:
    """Finished parts of a build, so that an interrupted one goes on. A part of another plan is refused."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan = folder, plan
        self.seconds: dict[str, float] = {}

    def find_or_make(self, name: str, make: Callable[[], Any]) -> Path:
        """The folder of a part, made and saved if it is not there."""
        folder = self._folder / name
        if not folder.exists():
            started = time.monotonic()
            model = make()
            with publish_folder(folder) as temporary:
                save_model(model, temporary)
                made = {"plan": asdict(self._plan), "seconds": round(time.monotonic() - started, 1)}
                write_json(temporary / _MADE, made)
        made = read_json(folder / _MADE)
        if made["plan"] != asdict(self._plan):
            raise TrainingError(
                f"{folder} was made by another plan: {made['plan']}. Give that plan's options, delete the folder, or "
                "choose another --output."
            )
        self.seconds[name] = made["seconds"]
        return folder

    @property
    def plan(self) -> Plan:
        """What the parts are made by."""
        return self._plan


def _autoencoder(parts: _Parts, pool: Callable[[], Pool]) -> AutoencoderKL:
    plan = parts.plan
    folder = parts.find_or_make(
        "autoencoder",
        lambda: train_autoencoder(
            pool(), steps=plan.steps_autoencoder, batch_size=plan.batch_autoencoder, seed=plan.seed
        ),
    )
    return AutoencoderKL.from_pretrained(folder).to(memory_format=torch.channels_last)


def _arbiter(
    parts: _Parts, pool: Callable[[], Pool], tokenizer: CLIPTokenizer, autoencoder: AutoencoderKL
) -> CLIPModel:
    plan = parts.plan

    def make() -> CLIPModel:
        model = make_arbiter(tokenizer, plan.seed)
        for descent, steps in enumerate((plan.steps_scorer, plan.steps_scorer_again)):
            train_arbiter(
                model,
                tokenizer,
                autoencoder,
                pool(),
                steps=steps,
                batch_size=plan.batch_scorer,
                seed=plan.seed + descent,
            )
        return model

    return CLIPModel.from_pretrained(parts.find_or_make("scorer", make))


def _teacher(
    parts: _Parts,
    pool: Callable[[], Pool],
    tokenizer: CLIPTokenizer,
    autoencoder: AutoencoderKL,
    *,
    preview: Path,
    preview_every: int,
) -> Path:
    plan = parts.plan

    def make() -> StableDiffusion3Pipeline:
        latents = encode(
            autoencoder, pool().pictures(torch.arange(plan.pictures)), torch.Generator().manual_seed(plan.seed)
        )
        latents = (latents - autoencoder.config.shift_factor) * autoencoder.config.scaling_factor
        model = make_denoiser(tokenizer, layers=plan.layers, width=plan.width, seed=plan.seed)
        pipeline = make_pipeline(autoencoder, model, tokenizer)

        def show(step: int) -> None:
            with publish_folder(preview) as folder:
                save_model(pipeline, folder)
            log.info("%s is the teacher after %d steps", preview, step)

        train_denoiser(
            model,
            tokenizer,
            latents,
            [scene.caption for scene in pool().scenes],
            steps=plan.steps_denoiser,
            batch_size=plan.batch_denoiser,
            learning_rate=plan.learning_rate,
            seed=plan.seed,
            export_every=preview_every,
            export=show,
        )
        return pipeline

    return parts.find_or_make("teacher", make)


def _parameters(teacher: StableDiffusion3Pipeline) -> dict[str, int]:
    return {name: _count(getattr(teacher, name)) for name in ("transformer", "vae", "text_encoder", "text_encoder_2")}


def _count(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
