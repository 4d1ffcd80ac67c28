"""Fixtures shared by all tests: a clean environment, a tiny teacher, settings of a run that takes seconds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from teefusion.settings import Settings, load_settings

if TYPE_CHECKING:  # with torch, for which no test should wait that has no use for it
    from tests.training_job import Job

# Rules that students of a few steps meet.
LENIENT_GATE = {"gate.margin": 0.99, "gate.style_margin": 0.99, "gate.max_guidance_residual": 1000}
LENIENT_GATE |= {"gate.min_speedup": 0, "gate.min_diversity": 0}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is marked slow may take longer than the limit in pyproject.toml, on a machine that others use too."""
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(1500))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the developer's own settings or tracking server reaches a test."""
    for name in list(os.environ):
        if name.startswith(("TEEFUSION_", "MLFLOW_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def tiny_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder with a random SD3 of a few thousand parameters: every part real, nothing trained."""
    folder = tmp_path_factory.mktemp("tiny-teacher")
    make_tiny_teacher(folder)
    return folder


@pytest.fixture(scope="session")
def larger_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So large that its tensors, and not what else a process does, are what a measurement of memory finds."""
    folder = tmp_path_factory.mktemp("larger-teacher")
    make_tiny_teacher(folder, layers=4, heads=8, head_width=64)
    return folder


def make_tiny_teacher(folder: Path, *, seed: int = 0, layers: int = 2, heads: int = 2, head_width: int = 8) -> None:
    """Random weights from ``seed``, 16-pixel pictures; 2 layers of width 16 if nothing else is said."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(seed)
    tokenizer = letter_tokenizer()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=head_width,
        num_attention_heads=heads,
        joint_attention_dim=32,
        caption_projection_dim=heads * head_width,
        pooled_projection_dim=32,
        pos_embed_max_size=8,
    )
    vae = tiny_autoencoder()
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=tiny_clip(),
        tokenizer=tokenizer,
        text_encoder_2=tiny_clip(),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_student(tiny_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student folder of the tiny teacher, not trained."""
    folder = tmp_path_factory.mktemp("tiny-student") / "student"
    make_tiny_student(folder, tiny_teacher)
    return folder


def make_tiny_student(folder: Path, teacher: Path) -> None:
    """Fuse the teacher in ``teacher`` and save it as a student, trained on 1 to 5 as far as it says."""
    from diffusers import StableDiffusion3Pipeline

    from teefusion.fusion import make_fusion
    from teefusion.students import make_student, save_student

    stock = StableDiffusion3Pipeline.from_pretrained(teacher, text_encoder_3=None, tokenizer_3=None)
    student = make_student(stock, make_fusion("affine"), max_sequence_length=0, guidance_range=(1.0, 5.0))
    save_student(student, folder)


def tiny_clip(*, projected: bool = True) -> Any:
    """A CLIP text encoder of width 16."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = letter_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(text)


def tiny_autoencoder() -> Any:
    """16 pixels to 4 x 8 x 8 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=1.5,
        shift_factor=0.05,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


@pytest.fixture(scope="session")
def tiny_scorer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP folder with random weights, 16-pixel pictures."""
    folder = tmp_path_factory.mktemp("tiny-scorer")
    make_tiny_scorer(folder)
    return folder


def make_tiny_scorer(folder: Path, *, seed: int = 1) -> None:
    """Random weights from ``seed``, one layer of width 16 for text and for pictures."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    tokenizer = letter_tokenizer()
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = shared | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = shared | {"image_size": 16, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def letter_tokenizer() -> Any:
    """CLIP's tokenizer with a vocabulary of single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    names = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(vocab={name: k for k, name in enumerate(names)}, merges=[], model_max_length=32)


@pytest.fixture(scope="session")
def migrated_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables in SQLite, which take seconds to make."""
    from teefusion.tracking import connect

    workdir = tmp_path_factory.mktemp("migrated")
    connect(load_settings(overrides={"workdir": workdir}))
    return workdir / "mlflow.db"


@pytest.fixture
def empty_registry(tmp_path: Path, migrated_database: Path) -> Path:
    """A workdir with an empty registry."""
    (tmp_path / "work").mkdir()
    shutil.copy(migrated_database, tmp_path / "work" / "mlflow.db")
    return tmp_path / "work"


@pytest.fixture
def prompt_file(tmp_path: Path) -> Path:
    """Sixty prompts in two styles."""
    path = tmp_path / "prompts.jsonl"
    words = ("red", "blue", "green", "black", "white", "pink")
    shapes = ("star", "moon", "ring", "box", "cross")
    lines = [
        json.dumps({"prompt": f"a {word} {shape} {style}", "style": style})
        for style in ("anime", "photo")
        for word in words
        for shape in shapes
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def make_settings(tmp_path: Path, tiny_teacher: Path, tiny_scorer: Path, prompt_file: Path) -> Callable[..., Settings]:
    """Pinned settings of a tiny run in ``tmp_path/work``; keyword ``overrides`` are dotted keys."""
    from teefusion.sources import pin

    def make(overrides: dict[str, Any] | None = None) -> Settings:
        return pin(
            load_settings(
                overrides=tiny_overrides(tmp_path, tiny_teacher, tiny_scorer, prompt_file) | (overrides or {})
            )
        )

    return make


@pytest.fixture
def job(make_settings: Callable[..., Settings], tmp_path: Path) -> Job:
    """A tiny prompt set and target set to train on."""
    from tests.training_job import Job

    return Job(make_settings, tmp_path)


def tiny_overrides(workdir: Path, teacher: Path, scorer: Path, prompts: Path) -> dict[str, Any]:
    """Dotted settings of a run of seconds."""
    return {
        "workdir": workdir / "work",
        "device": "cpu",
        "teacher.name": str(teacher),
        "teacher.max_sequence_length": 0,
        "prompts.source": str(prompts),
        "prompts.heldout_fraction": 0.4,
        "strategy.num_steps": 4,
        "targets.trajectories": 12,
        "targets.heldout_trajectories": 4,
        "targets.states_per_trajectory": 3,
        "targets.shard_trajectories": 4,
        "targets.batch_size": 4,
        "train.steps": 6,
        "train.batch_size": 4,
        "train.warmup_steps": 1,
        "train.log_every": 2,
        "train.eval_every": 3,
        "train.checkpoint_every": 2,
        "evaluate.scorer": str(scorer),
        "evaluate.prompts_per_style": 4,
        "evaluate.batch_size": 4,
        "evaluate.sweep": [1.0, 4.0],
        "evaluate.sweep_prompts": 2,
        "evaluate.diversity_prompts": 2,
        "evaluate.diversity_seeds": 2,
        "evaluate.picture_prompts": 2,
        "gate.min_prompts": 2,
        "gate.resamples": 1000,
    }
