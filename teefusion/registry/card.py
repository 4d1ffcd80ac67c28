"""The model card: what MLflow shows as a version's description."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from teefusion.group_means import OVERALL
from teefusion.settings import Settings
from teefusion.sources import bundled_path

_BUNDLED = "bundled:"


def model_card(settings: Settings, evaluation: dict[str, Any], lineage: dict[str, str]) -> str:
    """Markdown: teacher, licence, data, method, scores by style with intervals, gate, forwards, limits."""
    environment = Environment(
        loader=PackageLoader("teefusion"), undefined=StrictUndefined, autoescape=False
    )  # Markdown
    return environment.get_template("card.md.j2").render(
        {name: getattr(settings, name) for name in ("teacher", "prompts", "strategy", "targets", "fusion", "train")},
        name=settings.model_name,
        run_key=settings.run_key,
        licence=licence_of(settings.teacher.uri),
        evaluate=settings.evaluate,
        nfe=evaluation["nfe"],
        residual=evaluation["guidance_residual"],
        scorer=evaluation["scorer"]["name"],
        gate=evaluation["gate"],
        intervals=sorted(evaluation["gate"]["intervals"].items(), key=lambda item: (item[0] != OVERALL, item[0])),
        lineage=lineage,
    )


def licence_of(teacher: str) -> str:
    """A teacher's licence, from its model card: of this package, of a folder, or of the hub; else a hint."""
    if teacher.startswith(_BUNDLED):
        return "Apache-2.0"
    folder = bundled_path(teacher)
    try:
        card = (folder / "README.md").read_text() if folder else _hub_card(teacher)
    except (OSError, ValueError):
        card = ""
    found = _front_matter(card)
    name = found.get("license_name") or found.get("license")
    return str(name) if name else "unknown (the teacher has no model card that says)"


def _hub_card(teacher: str) -> str:
    """README.md of a hub repository. Raises OSError, ValueError."""
    from huggingface_hub import hf_hub_download

    return Path(hf_hub_download(teacher, "README.md")).read_text()


def _front_matter(card: str) -> dict[str, Any]:
    """The YAML between the first two lines of dashes."""
    if not card.startswith("---"):
        return {}
    try:
        found = yaml.safe_load(card.split("---")[1])
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}
