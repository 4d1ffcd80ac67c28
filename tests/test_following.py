"""A server follows its alias: the next student is taken up without a failed request, a bad one is not."""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests

from teefusion.errors import TrackingError
from teefusion.files import sha256_folder
from teefusion.serving import student as student_module
from teefusion.serving.metrics import Metrics
from teefusion.serving.student import Post, ServedStudent, load_served
from teefusion.settings import Settings
from teefusion.tracking import connect
from tests.conftest import make_tiny_student, make_tiny_teacher
from tests.running import ask, metric, running, serve_settings, wait


@pytest.fixture(scope="module")
def students(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two student folders of different weights."""
    folder = tmp_path_factory.mktemp("other")
    make_tiny_teacher(folder / "teacher", seed=1)
    make_tiny_student(folder / "student", folder / "teacher")
    return [tiny_student, folder / "student"]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """One registry for all tests, as making its database takes seconds; each test has a model of its own."""
    return serve_settings(tmp_path_factory.mktemp("registry"))


class Registry:
    """A model whose champion is version 1."""

    def __init__(self, settings: Settings, first: Path) -> None:
        self._client = connect(settings)
        self.name = f"m{len(self._client.search_registered_models())}"
        self.uri = f"models:/{self.name}@champion"
        self._client.create_registered_model(self.name)
        self.add(first)
        self.champion(1)

    def add(self, folder: Path, *, digest: str | None = None, gate: str = "passed") -> int:
        """A version of a student; its number."""
        tags = {"student_digest": digest or sha256_folder(folder), "gate": gate}
        return int(self._client.create_model_version(self.name, str(folder), tags=tags).version)

    def champion(self, version: int) -> None:
        """Move the alias, as by hand."""
        self._client.set_registered_model_alias(self.name, "champion", str(version))


@pytest.fixture
def registry(settings: Settings, students: list[Path]) -> Registry:
    return Registry(settings, students[0])


def served(url: str) -> str:
    """Name and version of the student."""
    return str(requests.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"])


class Load:
    """``clients`` that ask for pictures one after the other, until the block ends."""

    def __init__(self, url: str, clients: int) -> None:
        self._url, self._over = url, threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(k,)) for k in range(clients)]
        self.answers: list[tuple[int, str]] = []

    def _run(self, k: int) -> None:
        while not self._over.is_set():
            answer = ask(self._url, {"prompt": "a", "seed": k, "num_inference_steps": 3})
            self.answers.append((answer.status_code, answer.json().get("model", answer.text)))

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(60)


def test_a_champion_that_moves_under_load_takes_over_without_a_failed_request(
    settings: Settings, registry: Registry, students: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: list[weakref.ref[Any]] = []

    def load(uri: str, settings: Settings) -> ServedStudent:
        student = load_served(uri, settings)
        weights.append(weakref.ref(student.pipeline.transformer))
        return student

    monkeypatch.setattr(student_module, "load_served", load)
    with running(registry.uri, settings) as url:
        with Load(url, clients=6) as load:
            wait(lambda: len(load.answers) > 10)
            registry.champion(registry.add(students[1]))
            wait(lambda: load.answers[-1][1] == f"{registry.name}/2")
        assert {status for status, _ in load.answers} == {200}
        assert {model for _, model in load.answers} == {f"{registry.name}/1", f"{registry.name}/2"}
        assert metric(url, "teefusion_swaps_total") == 1
        digest = sha256_folder(students[1])
        assert metric(url, f'teefusion_student{{digest="{digest}",name="{registry.name}/2",version="2"}}') == 1
        assert [loaded() is None for loaded in weights] == [True, False]


def damaged(folder: Path) -> Path:
    """A student whose weights end early."""
    weights = next((folder / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    return folder


def without_a_vae(folder: Path) -> Path:
    """A student that loads as none."""
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    return folder


def add_missing(registry: Registry, folder: Path) -> int:
    number = registry.add(folder)
    shutil.rmtree(folder)
    return number


@pytest.mark.parametrize(
    ("add", "why"),
    [
        (lambda registry, folder: registry.add(folder, gate="failed"), "its gate did not pass"),
        (lambda registry, folder: registry.add(folder, digest="0" * 64), "not what was registered"),
        (add_missing, "is not there"),
        (lambda registry, folder: registry.add(damaged(folder)), "cannot be loaded as a student"),
        (lambda registry, folder: registry.add(without_a_vae(folder)), "cannot be loaded as a student"),
    ],
    ids=["untrusted", "changed", "missing", "damaged", "broken"],
)
def test_a_bad_champion_is_said_once_and_the_old_one_is_served_on(
    settings: Settings,
    registry: Registry,
    students: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    add: Callable[[Registry, Path], int],
    why: str,
) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(students[1], bad)
    with running(registry.uri, settings) as url, caplog.at_level(logging.WARNING, "teefusion.serving"):
        registry.champion(add(registry, bad))
        wait(lambda: metric(url, "teefusion_alias_refused") == 1)
        assert served(url) == f"{registry.name}/1"
        assert ask(url, {"prompt": "a"}).status_code == 200
        registry.champion(1)
        wait(lambda: metric(url, "teefusion_alias_refused") == 0)
        registry.champion(registry.add(students[1]))
        wait(lambda: served(url) == f"{registry.name}/3")
    said = [record.getMessage() for record in caplog.records if "cannot be followed" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"{registry.uri} cannot be followed, {registry.name}/1 is served on: ")
    assert why in said[0]


@pytest.fixture
def post(settings: Settings, registry: Registry) -> Post:
    """One that has loaded version 1, and looks when it is told to."""
    held = Post(registry.uri, settings, Metrics())
    asyncio.run(held._take_up())
    return held


def look(post: Post) -> None:
    asyncio.run(post.look())


def test_a_version_that_fails_to_load_is_tried_again_after_growing_pauses(
    post: Post, registry: Registry, students: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(student_module.time, "monotonic", lambda: now[0])
    loads: list[float] = []

    def fail(*_: Any) -> None:
        loads.append(now[0])
        raise MemoryError("no room")

    monkeypatch.setattr(student_module, "load_served", fail)
    registry.champion(registry.add(students[1]))
    for _ in range(50):
        look(post)
        now[0] += 10
    assert loads == [1000.0, 1060.0, 1180.0, 1420.0]
    assert post.current is not None
    assert post.current.card.id == f"{registry.name}/1"


@pytest.mark.parametrize("error", [TrackingError("no answer"), OSError("no answer")])
def test_a_registry_that_does_not_answer_changes_nothing_and_is_said_once(
    post: Post,
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(student_module, "version_of", fail)
    for _ in range(3):
        look(post)
    assert [record.getMessage() for record in caplog.records if record.name == student_module.__name__] == [
        f"Cannot see where {registry.uri} points, so nothing changes: no answer"
    ]
    text = post._metrics.text().decode()
    assert "teefusion_registry_errors_total 3.0" in text
    assert "teefusion_alias_refused 0.0" in text


def test_a_version_by_number_and_a_folder_are_not_followed(
    settings: Settings, registry: Registry, students: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []
    monkeypatch.setattr(student_module, "version_of", lambda uri, _: looked.append(uri))
    for uri in (f"models:/{registry.name}/1", str(students[0])):
        with running(uri, settings) as url:
            assert ask(url, {"prompt": "a"}).status_code == 200
    assert looked == []
