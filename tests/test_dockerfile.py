"""The Dockerfile: what it copies, installs and pins, and who its stages run as."""

from __future__ import annotations

import re

from tests.repository import PROJECT, ROOT


def _instructions() -> list[tuple[str, str]]:
    """The Dockerfile as (INSTRUCTION, arguments), comments gone and continued lines joined."""
    text = "\n".join(
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    )
    lines = (line.strip() for line in text.replace("\\\n", " ").splitlines())
    return [(line.split(None, 1)[0].upper(), line.split(None, 1)[1]) for line in lines if line]


def _stages() -> dict[str, list[tuple[str, str]]]:
    """Instructions of each stage by its name, the FROM line first."""
    stages: dict[str, list[tuple[str, str]]] = {}
    for instruction, arguments in _instructions():
        if instruction == "FROM":
            current = stages.setdefault(arguments.split()[-1], [])
        if stages:
            current.append((instruction, arguments))
    return stages


def test_dockerfile_copies_only_what_exists_and_enters_the_context() -> None:
    copied = {
        source.removeprefix("./").rstrip("/")
        for instruction, arguments in _instructions()
        if instruction in {"COPY", "ADD"} and "--from=" not in arguments
        for source in arguments.split()[:-1]
        if not source.startswith("--")
    }
    assert copied
    assert [source for source in sorted(copied) if not (ROOT / source).exists()] == []
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == allowed


def test_dockerfile_ends_each_running_stage_as_a_numeric_user() -> None:
    for stage in ("pipeline", "train", "serve"):
        users = [arguments for instruction, arguments in _stages()[stage] if instruction == "USER"]
        assert users[-1] == "1000:1000", stage


def test_dockerfile_gives_its_user_the_folder_it_starts_in() -> None:
    base = _stages()["base"]
    (made,) = (re.search(r"useradd --uid 1000 .*--create-home (\w+)", text) for kind, text in base if kind == "RUN")
    assert made is not None
    assert ("WORKDIR", f"/home/{made[1]}") in base
    everything_else = [stage for name, stage in _stages().items() if name not in ("build", "base")]
    assert not [text for stage in everything_else for kind, text in stage if kind in ("WORKDIR", "VOLUME", "COPY")]


def test_dockerfile_has_the_stages_that_the_chart_and_the_pipeline_name() -> None:
    templates = [path.read_text() for path in (ROOT / "charts" / "teefusion" / "templates").rglob("*.*")]
    named = {stage for text in templates for stage in re.findall(r'"stage" "(\w+)"', text)}
    assert named == {"pipeline", "train", "serve"} <= _stages().keys()


def test_dockerfile_pins_its_base_image() -> None:
    stages = _stages()
    defaults = dict(arguments.split("=", 1) for instruction, arguments in _instructions() if instruction == "ARG")
    for stage, instructions in stages.items():
        base = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], instructions[0][1].split()[0])
        if base not in stages:
            assert re.search(r":\d+\.\d+\.\d+-[\w-]+(@sha256:[0-9a-f]{64})?$", base), f"{stage}: {base}"
    assert ":latest" not in (ROOT / "Dockerfile").read_text()


def test_dockerfile_installs_under_the_constraints_and_by_known_extras() -> None:
    installs = [
        command.strip()
        for instruction, arguments in _instructions()
        if instruction == "RUN"
        for command in arguments.split("&&")
        if "pip install" in command
    ]
    assert installs
    assert [command for command in installs if "constraints.txt" not in command] == []
    extras = {
        name for command in installs for group in re.findall(r"\[([a-z,]+)\]", command) for name in group.split(",")
    }
    assert (
        {"pipeline", "steps", "train", "serve", "lora", "deepspeed"}
        == extras
        <= PROJECT["project"]["optional-dependencies"].keys()
    )
