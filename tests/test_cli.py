"""The command line as a user meets it: help, options, and one clear message for every mistake."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from teefusion.cli import cli

COMMANDS = ("run", "ingest", "targets", "train", "evaluate", "register", "generate", "compile")


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def assert_one_message(result: Result, code: int, *parts: str) -> None:
    """The exit code, and a message that names what is asked, without a traceback."""
    assert result.exit_code == code, result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    assert result.stdout == ""
    for part in parts:
        assert part in result.stderr


def test_help_lists_every_command() -> None:
    output = invoke("--help").output
    assert all(f"\n  {name} " in output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_shared_options_and_helps_on_each_option(command: str) -> None:
    output = invoke(command, "--help").output
    assert all(f"  {option}" in output for option in ("--config", "--workdir", "--set", "--json", "--debug"))


def test_help_imports_neither_torch_nor_kfp_nor_pydantic() -> None:
    code = "import sys; sys.argv = ['teefusion', '--help']\nfrom teefusion.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nprint([m for m in ('torch', 'kfp', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_ingest_prints_one_json_object(prompt_file: Path, tmp_path: Path) -> None:
    result = invoke("ingest", "--json", "--prompts", str(prompt_file), "--workdir", str(tmp_path / "w"))
    assert result.exit_code == 0, result.output
    values: dict[str, Any] = json.loads(result.stdout)
    assert values["read"] == 60
    assert values["train"] + values["heldout"] == 60
    assert values["reused"] is False
    again = invoke("ingest", "--json", "--prompts", str(prompt_file), "--workdir", str(tmp_path / "w"))
    assert json.loads(again.stdout)["reused"] is True


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "data", "parts"),
    [
        ("missing.txt", None, ["missing.txt"]),
        ("empty.txt", b"", ["empty.txt"]),
        ("binary.txt", b"\x89PNG\r\n\x1a\n\x00\x00", ["binary.txt"]),
        ("latin.txt", b"a caf\xe9\n", ["latin.txt", "UTF-8"]),
        ("list.json", b'{"prompt": 1}', ["list.json"]),
        ("x.jsonl", b'{"prompt": "a"}\n{"prompt": \n', ["x.jsonl", "line 2"]),
        ("columns.csv", b"text,style\na,b\n", ["columns.csv", "prompt"]),
        ("x.parquet", b"not parquet", ["x.parquet"]),
        ("x.docx", b"abc", ["x.docx", ".jsonl"]),
    ],
)
def test_a_bad_prompt_file_is_the_users_mistake(
    tmp_path: Path, name: str, data: bytes | None, parts: list[str]
) -> None:
    path = tmp_path / name
    if data is not None:
        write(path, data)
    result = invoke("ingest", "--prompts", str(path), "--workdir", str(tmp_path / "w"))
    assert_one_message(result, 2, *parts)
    assert not list((tmp_path / "w").rglob("manifest.json"))


def test_a_line_of_a_gigabyte_is_refused_without_being_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    with path.open("wb") as stream:
        stream.truncate(1 << 30)
    result = invoke("ingest", "--prompts", str(path), "--workdir", str(tmp_path / "w"))
    assert_one_message(result, 2, "huge.txt")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--teacher", "nobody"], ["Unknown teacher 'nobody'", "shapes"]),
        (["--guidance-min", "5", "--guidance-max", "2"], ["guidance_min (5) is above guidance_max (2)"]),
        (["--steps", "-3"], ["train.steps", "-3"]),
        (["--set", "train.stepz=3"], ["train.stepz"]),
        (["--set", "nonsense"], ["--set takes KEY=VALUE"]),
        (["--set", "train.steps=[1"], ["not valid YAML"]),
        (["--config", "/no/such.yaml"], ["/no/such.yaml"]),
    ],
)
def test_bad_settings_are_the_users_mistake(tmp_path: Path, arguments: list[str], parts: list[str]) -> None:
    assert_one_message(invoke("run", "--workdir", str(tmp_path / "w"), *arguments), 2, *parts)
    assert not (tmp_path / "w").exists()


def test_a_teacher_folder_that_is_no_pipeline_is_refused(tmp_path: Path, prompt_file: Path) -> None:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "readme.txt").write_text("x")
    options = ["--workdir", str(tmp_path / "w"), "--prompts", str(prompt_file)]
    result = invoke("targets", "--teacher", str(tmp_path / "teacher"), *options)
    assert_one_message(result, 2, "is not a diffusers pipeline", "model_index.json")


def test_a_teacher_of_no_known_family_is_refused_by_name(tmp_path: Path, prompt_file: Path) -> None:
    (tmp_path / "teacher").mkdir()
    index = {"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}
    (tmp_path / "teacher" / "model_index.json").write_text(json.dumps(index))
    options = ["--workdir", str(tmp_path / "w"), "--prompts", str(prompt_file)]
    result = invoke("targets", "--teacher", str(tmp_path / "teacher"), *options)
    assert_one_message(result, 2, "SanaTransformer2DModel cannot be fused", "SD3Transformer2DModel")


def test_a_teacher_of_another_revision_than_the_one_asked_for_is_refused(tmp_path: Path) -> None:
    result = invoke("targets", "--revision", "sha256:0123456789abcdef", "--workdir", str(tmp_path / "w"))
    assert_one_message(result, 2, "bundled:shapes is not revision sha256:0123456789abcdef", "leave the revision out")


def test_a_stage_without_its_input_names_the_command_that_makes_it(tmp_path: Path, prompt_file: Path) -> None:
    options = ["--workdir", str(tmp_path / "w"), "--prompts", str(prompt_file)]
    assert_one_message(invoke("train", *options), 1, "Run 'teefusion targets' first")


@pytest.mark.parametrize(
    "command",
    [
        ("generate", "FOLDER", "--prompt", "a"),
        ("serve", "FOLDER"),
        ("evaluate", "--student", "FOLDER"),
        ("compare", "FOLDER", "shapes"),
    ],
    ids=lambda command: command[0],
)
def test_a_student_folder_that_is_none_is_refused(tmp_path: Path, command: tuple[str, ...]) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    arguments = [str(folder) if part == "FOLDER" else part for part in command]
    result = invoke(*arguments, "--workdir", str(tmp_path / "w"))
    assert_one_message(result, 2, f"{folder} is n", "model_index.json is missing")


def test_an_mlflow_server_that_does_not_answer_is_found_before_anything_is_spent(tmp_path: Path) -> None:
    with socket.socket() as taken:  # bound and not listening: connections are refused
        taken.bind(("127.0.0.1", 0))
        uri = f"http://user:secret-word@127.0.0.1:{taken.getsockname()[1]}"
        result = invoke("run", "--workdir", str(tmp_path / "w"), "--tracking-uri", uri)
    assert_one_message(result, 1, "No MLflow server answers", "TEEFUSION_MLFLOW__TRACKING_URI")
    assert "secret-word" not in result.output
    assert not (tmp_path / "w" / "targets").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = invoke("ingest", "--prompts", "/no/such.txt", "--workdir", str(tmp_path), "--debug")
    assert result.exception is not None
    assert not isinstance(result.exception, SystemExit)


def test_an_estimate_is_printed_and_nothing_is_made(tmp_path: Path) -> None:
    arguments = ["--teacher", "sd3-medium", "--trajectories", "10000000", "--workdir", str(tmp_path / "w")]
    shown = invoke("targets", "--estimate", "H200", *arguments)
    assert shown.exit_code == 0, shown.output
    assert "10,000,512, of them 512 held out" in shown.stdout
    values = json.loads(invoke("targets", *arguments, "--prompt-count", "1000", "--json", "--estimate").stdout)
    assert (values["device"], values["prompts"]) == ("H100-SXM", 1512)
    assert values["forwards"] == 10_000_512 * 56
    assert_one_message(invoke("targets", "--estimate", "abacus", *arguments), 2, "'abacus' is not known", "H200")
    assert not (tmp_path / "w").exists()


def test_verify_names_what_is_bad_and_mends_it(make_settings: Any, tmp_path: Path) -> None:
    from teefusion.stages.ingest import ingest
    from teefusion.stages.targets import targets

    settings = make_settings()
    made = targets(settings, Path(ingest(settings).output))
    config = write(tmp_path / "run.yaml", json.dumps(settings.model_dump(mode="json")).encode())
    arguments = ["verify", "--config", str(config), "--workdir", str(settings.workdir)]
    assert "all good" in invoke("targets", *arguments).stdout
    shard = Path(made.output) / "states" / "train-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    bad = invoke("targets", *arguments)
    assert bad.exit_code == 1
    assert f"states/train-00002: {shard} is corrupt" in bad.stdout
    assert json.loads(invoke("targets", *arguments, "--json").stdout)["bad"].keys() == {"states/train-00002"}
    mended = invoke("targets", *arguments, "--repair")
    assert (mended.exit_code, mended.stdout.splitlines()[-1].rpartition(": ")[2]) == (0, "1 bad, made anew")
    assert "all good" in invoke("targets", *arguments, str(made.output)).stdout
    assert_one_message(invoke("targets", *arguments, str(tmp_path)), 1, "is no finished target set")
