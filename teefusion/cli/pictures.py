"""The commands that draw with finished models: generate, compare, serve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from teefusion.cli.command import command
from teefusion.cli.options import EVALUATE, REGISTRY

if TYPE_CHECKING:
    from teefusion.settings import Settings


@command("device", pinned=False)
@click.argument("student", type=click.Path(path_type=Path))
@click.option("--prompt", "texts", multiple=True, required=True, help="What to draw; repeatable.")
@click.option("--guidance-scale", type=float, default=4.0, show_default=True, help="diffusers' s.")
@click.option("--num-steps", type=click.IntRange(1, 1000), help="Sampler steps.  [default: the student's own, else 20]")
@click.option("--images", type=click.IntRange(1, 64), default=1, show_default=True, help="Pictures a prompt.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("pictures"), show_default=True, help="Folder.")
def generate(
    settings: Settings,
    student: Path,
    texts: tuple[str, ...],
    guidance_scale: float,
    num_steps: int | None,
    images: int,
    seed: int,
    output: Path,
) -> dict[str, Any]:
    """Make pictures with the STUDENT in a folder."""
    from teefusion.student_index import read_index

    read_index(student)  # before the seconds that the models' libraries take
    from teefusion.generation import generate as make

    paths = make(
        student,
        list(texts),
        guidance_scale=guidance_scale,
        num_steps=num_steps,
        images=images,
        seed=seed,
        output=output,
        device=settings.device,
    )
    return {"images": [str(path) for path in paths], "_text": "\n".join(str(path) for path in paths)}


@command("host", "port", *REGISTRY, "device", pinned=False)
@click.argument("model", required=False)
def serve(settings: Settings, model: str | None) -> dict[str, Any]:
    """Make pictures over HTTP with MODEL, until SIGTERM.

    MODEL is models:/NAME@alias (followed when it moves), models:/NAME/VERSION, a student folder or a hub id; without
    one, the champion of these settings.
    """
    from teefusion.serving.server import Server

    uri = model or f"models:/{settings.model_name}@champion"
    Server(uri, settings).run()
    return {"model": uri, "_text": "stopped"}


@command("prompts", *EVALUATE, "tracking-uri", "device")
@click.argument("models", nargs=-1, required=True)
def compare(settings: Settings, models: tuple[str, ...]) -> dict[str, Any]:
    """Compare any two or more MODELS on held-out prompts: the evaluation's report, and no verdict.

    Each is a student folder, a teacher (preset, diffusers folder or hub id), or a registered version:
    models:/NAME/VERSION or models:/NAME@ALIAS. The first is what the others are held against.
    """
    from teefusion.compare import compare as run_comparison
    from teefusion.compare import table

    result = run_comparison(settings, models)
    return result | {"_text": table(result)}
