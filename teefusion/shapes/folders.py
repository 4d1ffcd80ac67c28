"""The folders that are published: a diffusers SD3 pipeline, a transformers CLIP with its processor, and the prompts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from teefusion.files import read_json, write_json
from teefusion.shapes.arbiter import CLIP_MEAN, CLIP_STD
from teefusion.shapes.denoiser import SHIFT, Denoiser
from teefusion.shapes.drawings import SIZE


def make_pipeline(autoencoder: AutoencoderKL, model: Denoiser, tokenizer: CLIPTokenizer) -> StableDiffusion3Pipeline:
    """The teacher as diffusers runs it: SD3 without T5."""
    return StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=autoencoder,
        text_encoder=model.text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=model.text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def save_model(model: Any, folder: Path) -> None:
    """``save_pretrained``, without the path the model was loaded from: folders tell nothing of who made them."""
    model.save_pretrained(folder)
    for file in sorted(folder.rglob("*.json")):
        content = read_json(file)
        if content.pop("_name_or_path", None) is not None:
            write_json(file, content)


def load_pipeline(folder: Path) -> StableDiffusion3Pipeline:
    """A teacher folder. The two arguments are needed: diffusers takes a T5 that is not there for a forgotten one."""
    pipeline = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def save_scorer(folder: Path, arbiter: CLIPModel, tokenizer: CLIPTokenizer) -> None:
    """What ``CLIPModel`` and ``CLIPProcessor`` load, the latter without torchvision."""
    save_model(arbiter, folder)
    tokenizer.save_pretrained(folder)
    CLIPImageProcessorPil(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    ).save_pretrained(folder)
