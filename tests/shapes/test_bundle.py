"""The trained folders in the repository, as users meet them."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer

from teefusion.scoring import ClipScorer
from teefusion.shapes import PROMPTS_FILE, SCORER_DIR, TEACHER_DIR
from teefusion.shapes.arbiter import pairwise_accuracy
from teefusion.shapes.autoencoder import encode, reconstruct
from teefusion.shapes.corpus import make_pool, make_tokenizer, split_scenes
from teefusion.shapes.drawings import STYLES
from teefusion.shapes.folders import load_pipeline
from teefusion.shapes.measures import fine_energy, score_samples
from teefusion.shapes.prompts import main as write_prompts

MB = 1_000_000
PAIRS = 300
STEPS = 10  # half of what training.json was measured with


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_pipeline(TEACHER_DIR)


@pytest.fixture(scope="module")
def captions() -> list[str]:
    """Of scenes that neither teacher nor arbiter was trained on."""
    _, heldout = split_scenes()
    return [heldout[k].caption for k in np.random.default_rng(0).permutation(len(heldout))[:64]]


@pytest.fixture(scope="module")
def guided(teacher: Any, captions: list[str]) -> np.ndarray:
    return score_samples(teacher, ClipScorer(SCORER_DIR), captions, guidance_scale=4.0, num_inference_steps=STEPS)


@pytest.mark.parametrize(("folder", "largest"), [(TEACHER_DIR, 15 * MB), (SCORER_DIR, 5 * MB)])
def test_folders_are_small_and_hold_no_pickles(folder: Path, largest: int) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= largest
    assert {file.suffix for file in files} == {".json", ".safetensors"}


def test_folders_do_not_name_where_they_were_made() -> None:
    for file in [*TEACHER_DIR.rglob("*.json"), *SCORER_DIR.rglob("*.json")]:
        assert "_name_or_path" not in file.read_text()


def test_folders_share_the_tokenizer_of_the_code() -> None:
    for folder in (TEACHER_DIR / "tokenizer", TEACHER_DIR / "tokenizer_2", SCORER_DIR):
        assert CLIPTokenizer.from_pretrained(folder).get_vocab() == make_tokenizer().get_vocab()


def test_the_stock_pipeline_runs_the_teacher_with_its_own_defaults(teacher: Any) -> None:
    assert type(teacher).__name__ == "StableDiffusion3Pipeline"
    assert {p.dtype for p in teacher.transformer.parameters()} == {torch.float32}
    images = teacher("a photo of a red star on a blue background", guidance_scale=4, num_inference_steps=2).images
    assert images[0].size == (64, 64)


def test_latents_have_unit_scale(teacher: Any) -> None:
    pool = make_pool(split_scenes()[1], 231, seed=777)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        latents = teacher.vae.encode(pool.pictures(torch.arange(231))).latent_dist.sample(generator)
    scaled = (latents - teacher.vae.config.shift_factor) * teacher.vae.config.scaling_factor
    assert abs(float(scaled.mean())) < 0.1
    assert abs(float(scaled.std()) - 1) < 0.1


def test_latents_are_smooth(teacher: Any) -> None:
    pool = make_pool(split_scenes()[1], 231, seed=777)
    latents = encode(teacher.vae, pool.pictures(torch.arange(231)), torch.Generator().manual_seed(0))
    assert fine_energy(latents) < 0.06  # a thumbnail's is 0.03; without the pull to it 0.32


@pytest.mark.parametrize("through_autoencoder", [False, True])
def test_arbiter_tells_right_captions_from_wrong_ones(teacher: Any, through_autoencoder: bool) -> None:
    arbiter, tokenizer = CLIPModel.from_pretrained(SCORER_DIR), CLIPTokenizer.from_pretrained(SCORER_DIR)
    pool = make_pool(split_scenes()[1], PAIRS, seed=777)
    pictures = pool.pictures(torch.arange(PAIRS))
    if through_autoencoder:
        pictures = reconstruct(teacher.vae, pictures)
    accuracy = pairwise_accuracy(arbiter, tokenizer, pictures, list(pool.scenes), seed=1)
    assert set(accuracy) == {"random", "shape", "color", "background", "style"}
    assert min(accuracy.values()) >= 0.95, accuracy


def test_arbiters_processor_gives_what_the_scorer_computes() -> None:
    pool = make_pool(split_scenes()[1], 4, seed=777)
    images = [Image.fromarray(picture) for picture in pool.pixels_NCHW.permute(0, 2, 3, 1).numpy()]
    captions = [scene.caption for scene in pool.scenes]
    inputs = CLIPProcessor.from_pretrained(SCORER_DIR)(
        text=captions, images=images, return_tensors="pt", padding="max_length"
    )
    with torch.no_grad():
        output = CLIPModel.from_pretrained(SCORER_DIR)(**inputs)
    cosine = (output.image_embeds * output.text_embeds).sum(-1)
    np.testing.assert_allclose(ClipScorer(SCORER_DIR).score(images, captions), 100 * cosine.numpy(), atol=0.05)


def test_guidance_improves_the_teacher(teacher: Any, captions: list[str], guided: np.ndarray) -> None:
    gain = guided - score_samples(
        teacher, ClipScorer(SCORER_DIR), captions, guidance_scale=1.0, num_inference_steps=STEPS
    )
    error = gain.std(ddof=1) / len(gain) ** 0.5
    # training.json states 3.0 with a standard error of 0.4 over all 231 and 20 steps.
    assert gain.mean() > 1.0
    assert gain.mean() > 2 * error


def test_stock_empty_tokens_do_not_harm(teacher: Any, captions: list[str], guided: np.ndarray) -> None:
    few = captions[:8]
    stock = score_samples(
        teacher, ClipScorer(SCORER_DIR), few, guidance_scale=4.0, max_sequence_length=256, num_inference_steps=STEPS
    )
    assert abs((stock - guided[:8]).mean()) < 3.0


def test_prompt_file_is_what_the_command_writes(tmp_path: Path) -> None:
    write_prompts(["--output", str(tmp_path / "prompts.jsonl")])
    assert (tmp_path / "prompts.jsonl").read_bytes() == PROMPTS_FILE.read_bytes()
    rows = [json.loads(line) for line in PROMPTS_FILE.read_text().splitlines()]
    assert Counter(row["style"] for row in rows) == dict.fromkeys(STYLES, 576)
    assert len({row["prompt"] for row in rows}) == len(rows)
