"""The Dockerfile: what it copies, installs and pins, and who its stages run as."""

from __future__ import annotations

import re

from tests.dockerfile import installs, instructions, stages
from tests.repository import PROJECT, ROOT


def test_dockerfile_copies_only_what_exists_and_enters_the_context() -> None:
    copied = {
        source.removeprefix("./").rstrip("/")
        for instruction, arguments in instructions()
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
        users = [arguments for instruction, arguments in stages()[stage] if instruction == "USER"]
        assert users[-1] == "1000:1000", stage


def test_dockerfile_gives_its_user_the_folder_it_starts_in() -> None:
    base = stages()["base"]
    (made,) = (re.search(r"useradd --uid 1000 .*--create-home (\w+)", text) for kind, text in base if kind == "RUN")
    assert made is not None
    assert ("WORKDIR", f"/home/{made[1]}") in base
    everything_else = [stage for name, stage in stages().items() if name not in ("build", "base")]
    assert not [text for stage in everything_else for kind, text in stage if kind in ("WORKDIR", "VOLUME", "COPY")]


def test_dockerfile_has_the_stages_that_the_chart_and_the_pipeline_name() -> None:
    templates = [path.read_text() for path in (ROOT / "charts" / "teefusion" / "templates").rglob("*.*")]
    named = {stage for text in templates for stage in re.findall(r'"stage" "(\w+)"', text)}
    assert named == {"pipeline", "train", "serve"} <= stages().keys()


def test_dockerfile_pins_its_base_image() -> None:
    defaults = dict(arguments.split("=", 1) for instruction, arguments in instructions() if instruction == "ARG")
    for stage, lines in stages().items():
        base = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], lines[0][1].split()[0])
        if base not in stages():
            assert re.search(r":\d+\.\d+\.\d+-[\w-]+(@sha256:[0-9a-f]{64})?$", base), f"{stage}: {base}"
    assert ":latest" not in (ROOT / "Dockerfile").read_text()


def test_dockerfile_installs_under_the_constraints_and_by_known_extras() -> None:
    commands = [command for stage in stages() for command in installs(stage)]
    assert commands
    assert [command for command in commands if "constraints.txt" not in command] == []
    extras = {
        name for command in commands for group in re.findall(r"\[([a-z,]+)\]", command) for name in group.split(",")
    }
    assert (
        {"pipeline", "steps", "train", "serve", "lora", "deepspeed"}
        == extras
        <= PROJECT["project"]["optional-dependencies"].keys()
    )
