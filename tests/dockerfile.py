"""The Dockerfile, read: its instructions, its stages, and what each of them installs."""

from __future__ import annotations

import re

from tests.repository import ROOT


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (INSTRUCTION, arguments), comments gone and continued lines joined."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in lines if line]


def stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage by its name, the FROM line first."""
    found: dict[str, list[tuple[str, str]]] = {}
    for instruction, arguments in instructions():
        if instruction == "FROM":
            current = found.setdefault(arguments.split()[-1], [])
        if found:
            current.append((instruction, arguments))
    return found


def installs(stage: str) -> list[str]:
    """The shell commands by which a stage, and before it those that it is built on, installs packages by pip."""
    own = stages()[stage]
    below = own[0][1].split()[0]
    commands = [
        command
        for kind, text in own
        if kind == "RUN"
        for command in re.sub(r"--mount=\S+", "", text).split("&&")
        if "pip install" in command
    ]
    return (installs(below) if below in stages() else []) + [" ".join(command.split()) for command in commands]
