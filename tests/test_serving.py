"""The server as its clients meet it: pictures, refusals, and what becomes of what nobody waits for."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
from PIL import Image

from teefusion.errors import RegistryError, SettingsError, StudentError
from teefusion.generation import generate
from teefusion.serving import student as student_module
from teefusion.serving.batches import AbandonedError, Picture
from teefusion.serving.student import ServedStudent, load_served
from tests.running import ask, metric, pictures, running, serve_settings, wait


@pytest.fixture(scope="module")
def url(tiny_student: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the tiny student, within small limits."""
    limits = {"max_images": 3, "max_steps": 4, "max_prompt_chars": 50, "sizes": ["16x16", "32x16"]}
    with running(tiny_student, serve_settings(tmp_path_factory.mktemp("serve"), **limits)) as address:
        yield address


# Pictures


def test_an_answer_has_openais_shape_and_says_what_made_it(url: str, tiny_student: Path) -> None:
    answer = ask(url, {"prompt": "a red star", "n": 2, "size": "32x16", "seed": 7, "guidance_scale": 3.5})
    body = answer.json()
    assert [picture.size for picture in pictures(answer)] == [(32, 16), (32, 16)]
    assert [item["seed"] for item in body["data"]] == [7, 8]
    assert abs(body["created"] - time.time()) < 60
    rest = {name: body[name] for name in body if name not in ("data", "created")}
    assert rest == {
        "output_format": "png",
        "size": "32x16",
        "guidance_scale": 3.5,
        "num_inference_steps": 2,
        "model": f"{tiny_student.parent.name}/student",
    }


def test_a_picture_is_the_one_that_the_generate_command_makes(url: str, tiny_student: Path, tmp_path: Path) -> None:
    (path,) = generate(
        tiny_student, ["a moon"], guidance_scale=4.0, num_steps=2, images=1, seed=5, output=tmp_path, device="cpu"
    )
    (picture,) = pictures(ask(url, {"prompt": "a moon", "seed": 5}))
    assert largest_difference(picture, Image.open(path)) <= 1


def test_a_number_without_a_fraction_is_whole_however_it_is_spelt(url: str) -> None:
    answer = ask(url, '{"prompt": "a", "n": 1.0, "seed": 3.0, "num_inference_steps": 2.0, "guidance_scale": 4}')
    assert answer.json()["data"][0]["seed"] == 3


def test_without_a_seed_each_picture_is_another_and_its_seed_gives_it_again(url: str) -> None:
    answers = [ask(url, {"prompt": "a"}) for _ in range(2)]
    seeds = [answer.json()["data"][0]["seed"] for answer in answers]
    assert seeds[0] != seeds[1]
    (again,) = pictures(ask(url, {"prompt": "a", "seed": seeds[0]}))
    assert largest_difference(again, pictures(answers[0])[0]) <= 1


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    """Of 255, over all pixels and channels."""
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def test_a_picture_is_the_same_in_any_company(tiny_student: Path, tmp_path: Path) -> None:
    """In float32 to the last of 255 levels: where a tensor lies in a batch chooses the kernel, so the last digit."""
    student = load_served(str(tiny_student), serve_settings(tmp_path))
    alone = [Picture(student, prompt, s, seed, 4, (16, 16)) for prompt, s, seed in COMPANY]
    together = student.draw(alone)
    for picture, drawn in zip(alone, together, strict=True):
        assert largest_difference(drawn, student.draw([picture])[0]) <= 1
    assert min(largest_difference(together[0], other) for other in together[1:]) > 1


COMPANY = [("a red star", 1.0, 0), ("a red star", 5.0, 0), ("a red star", 1.0, 1), ("a blue moon", 1.0, 0)]


def test_concurrent_requests_are_drawn_together(url: str) -> None:
    before = metric(url, "teefusion_batch_pictures_count"), metric(url, "teefusion_pictures_total")
    with_threads(lambda k: pictures(ask(url, {"prompt": "a", "seed": k, "guidance_scale": 1 + k / 4})), 16)
    batches = metric(url, "teefusion_batch_pictures_count") - before[0]
    assert metric(url, "teefusion_pictures_total") - before[1] == 16
    assert batches < 16


def with_threads(call: Callable[[int], Any], count: int) -> list[Any]:
    """What ``call`` returns for 0 to ``count`` - 1, each in a thread."""
    results: dict[int, Any] = {}
    threads = [threading.Thread(target=lambda k=k: results.update({k: call(k)})) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[k] for k in range(count)]


# Refusals


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, "prompt", "prompt: Field required"),
        ({"prompt": ""}, "prompt", "at least 1 character"),
        ({"prompt": "x" * 51}, "prompt", "at most 50 characters"),
        ({"prompt": "a", "n": 4}, "n", "less than or equal to 3"),
        ({"prompt": "a", "n": "1"}, "n", "valid integer"),
        ({"prompt": "a", "size": "64x64"}, "size", "'auto', '16x16' or '32x16'"),
        ({"prompt": "a", "num_inference_steps": 5}, "num_inference_steps", "less than or equal to 4"),
        ({"prompt": "a", "guidance_scale": 0.5}, "guidance_scale", "greater than or equal to 1"),
        ({"prompt": "a", "guidance_scale": 21}, "guidance_scale", "less than or equal to 20"),
        ({"prompt": "a", "seed": -1}, "seed", "greater than or equal to 0"),
        ({"prompt": "a", "response_format": "url"}, "response_format", "'b64_json'"),
        ({"prompt": "a", "negative_prompt": "b"}, "negative_prompt", "not permitted"),
        ('{"prompt": "a", "guidance_scale": NaN}', "guidance_scale", "finite"),
        ("{", None, "body: Invalid JSON"),
        ("[]", None, "body: "),
        (b"\xff", None, "body: Invalid JSON"),
    ],
)
def test_a_bad_request_is_answered_with_the_field_and_what_it_may_be(
    url: str, body: Any, param: str | None, message: str
) -> None:
    answer = ask(url, body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, "invalid_value")
    assert message in error["message"]


def test_a_body_beyond_any_prompt_is_refused_before_it_is_read(url: str) -> None:
    answer = ask(url, iter([b"x" * 10_000] * 5))
    assert answer.status_code == 413
    assert "larger than 10600 bytes" in answer.json()["error"]["message"]


def test_an_unknown_path_or_method_is_answered_in_the_same_shape(url: str) -> None:
    assert requests.get(f"{url}/nothing", timeout=10).json()["error"]["message"] == "Not Found"
    answer = requests.delete(f"{url}/v1/models", timeout=10)
    assert (answer.status_code, answer.headers["Allow"]) == (405, "GET")
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_the_key_is_asked_for_where_pictures_are_made_and_nowhere_else(tiny_student: Path, tmp_path: Path) -> None:
    with running(tiny_student, serve_settings(tmp_path, api_key="sesame")) as url:
        for header in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Basic sesame"}):
            answer = ask(url, {"prompt": "a"}, headers=header)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
            assert answer.headers["WWW-Authenticate"] == "Bearer"
        assert ask(url, {"prompt": "a"}, headers={"Authorization": "Bearer sesame"}).status_code == 200
        for path in ("/", "/healthz", "/readyz", "/metrics", "/openapi.json"):
            answer = requests.get(url + path, timeout=10)
            assert answer.status_code == 200
            assert "sesame" not in answer.text
    settings = serve_settings(tmp_path, api_key="sesame")
    assert "sesame" not in repr(settings) + settings.to_json()
    assert settings.run_key == serve_settings(tmp_path).run_key


# What takes long


class Slow:
    """The tiny student's pipeline, which stands before its first step until ``gate`` opens."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self.gate = threading.Event()
        self.calls = 0
        self.abandoned = 0

    def __call__(self, *arguments: Any, callback_on_step_end: Callable[..., Any], **options: Any) -> Any:
        self.calls += 1
        try:
            while not self.gate.wait(0.01):
                callback_on_step_end(self, 0, None, {})
        except AbandonedError:
            self.abandoned += 1
            raise
        return self._pipeline(*arguments, callback_on_step_end=callback_on_step_end, **options)


@pytest.fixture
def slow(tiny_student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Slow:
    """Stands in for every student that is loaded from now on."""
    served = load_served(str(tiny_student), serve_settings(tmp_path))
    slow = Slow(served.pipeline)
    stand_in = ServedStudent(slow, served.card, served.request_type, None)
    monkeypatch.setattr(student_module, "load_served", lambda uri, settings: stand_in)
    return slow


def test_a_full_queue_answers_429_and_when_to_come_back(slow: Slow, tmp_path: Path) -> None:
    with running("any", serve_settings(tmp_path, max_waiting=2, max_images=2)) as url:
        first = threading.Thread(target=ask, args=(url, {"prompt": "a"}))
        first.start()
        wait(lambda: slow.calls == 1)
        waiting = threading.Thread(target=ask, args=(url, {"prompt": "a", "n": 2}))
        waiting.start()
        wait(lambda: metric(url, "teefusion_waiting_pictures") == 2)
        answer = ask(url, {"prompt": "a"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "2")
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        slow.gate.set()
        first.join(30)
        waiting.join(30)
        assert ask(url, {"prompt": "a"}).status_code == 200
        assert metric(url, 'teefusion_requests_total{status="429"}') == 1


def test_a_request_that_takes_too_long_is_answered_504_and_its_work_ends(slow: Slow, tmp_path: Path) -> None:
    with running("any", serve_settings(tmp_path, timeout_s=2)) as url:
        answer = ask(url, {"prompt": "a"})
        assert answer.status_code == 504
        assert "Not drawn within 2 s" in answer.json()["error"]["message"]
        wait(lambda: slow.abandoned == 1)
        slow.gate.set()
        assert ask(url, {"prompt": "a"}).status_code == 200


def test_the_work_of_clients_that_go_away_is_dropped(slow: Slow, tmp_path: Path) -> None:
    with running("any", serve_settings(tmp_path)) as url:
        ask_and_leave(url, {"prompt": "a", "n": 3}, when=lambda: slow.calls == 1)
        wait(lambda: slow.abandoned == 1)
        patient = threading.Thread(target=ask, args=(url, {"prompt": "a"}))
        patient.start()
        wait(lambda: slow.calls == 2)
        ask_and_leave(url, {"prompt": "a", "n": 2}, when=lambda: metric(url, "teefusion_waiting_pictures") == 2)
        wait(lambda: metric(url, 'teefusion_requests_total{status="499"}') == 2)
        assert metric(url, "teefusion_waiting_pictures") == 0
        slow.gate.set()
        patient.join(30)
        assert slow.calls == 2
        assert metric(url, "teefusion_dropped_pictures_total") == 5
        assert metric(url, "teefusion_pictures_total") == 1


def ask_and_leave(url: str, body: dict[str, Any], *, when: Callable[[], bool]) -> None:
    """Ask for pictures, and hang up."""
    address = urlsplit(url)
    assert address.port is not None
    data = json.dumps(body).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Length: {len(data)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", address.port)) as client:
        client.sendall(head.encode() + data)
        wait(when)


def test_a_defect_while_drawing_is_a_500_for_one_request(slow: Slow, tmp_path: Path) -> None:
    slow.gate.set()
    with running("any", serve_settings(tmp_path)) as url:
        good, slow._pipeline = slow._pipeline, None
        answer = ask(url, {"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
        assert "NoneType" not in answer.text
        slow._pipeline = good
        assert ask(url, {"prompt": "a"}).status_code == 200


# Beginning and end


def test_it_is_alive_before_it_is_ready(slow: Slow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrived = threading.Event()
    load = student_module.load_served
    monkeypatch.setattr(student_module, "load_served", lambda *given: arrived.wait(30) and load(*given))
    with running("any", serve_settings(tmp_path), ready=False) as url:
        wait(lambda: requests.get(f"{url}/healthz", timeout=10).ok)
        assert requests.get(f"{url}/readyz", timeout=10).status_code == 503
        answer = ask(url, {"prompt": "a"})
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        arrived.set()
        wait(lambda: requests.get(f"{url}/readyz", timeout=10).ok)


def test_a_first_student_that_cannot_be_served_ends_the_server_with_the_reason(
    tiny_student: Path, tiny_teacher: Path, tmp_path: Path
) -> None:
    for uri, options, error, message in (
        (tmp_path / "none", {}, RegistryError, "There is no folder"),
        (tiny_teacher, {}, StudentError, "no student"),
        (tiny_student, {"sizes": ["18x16"]}, StudentError, r"cannot draw 18x16: .*divisible.*Set serve.sizes"),
    ):
        with pytest.raises(error, match=message), running(uri, serve_settings(tmp_path, **options)):
            pass


def test_an_address_that_is_taken_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(SettingsError, match=f"Cannot listen on 127.0.0.1 port {port}"),
            running("any", serve_settings(tmp_path, port=port)),
        ):
            pass


def test_sigterm_lets_what_was_asked_be_answered(tiny_student: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "teefusion.cli", "serve", str(tiny_student), "--port", "0", "--workdir"]
    options = ["--set", "device=cpu", "--set", "serve.max_steps=1000", "--set", "serve.max_batch=1"]
    process = subprocess.Popen([*command, str(tmp_path), *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = iter(process.stderr.readline, "")
        url = next(found[0] for line in lines if (found := re.search(r"http://\S+", line)))
        wait(lambda: requests.get(f"{url}/readyz", timeout=10).ok)
        answers: list[requests.Response] = []
        long = {"prompt": "a", "n": 3, "num_inference_steps": 100}
        thread = threading.Thread(target=lambda: answers.append(ask(url, long)))
        thread.start()
        wait(lambda: metric(url, "teefusion_waiting_pictures") == 2)
        process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert len(pictures(answers[0])) == 3
        assert process.wait(30) == 0
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{url}/healthz", timeout=10)
    finally:
        process.kill()
        process.wait()


# The contract


def test_the_openapi_has_examples_and_the_limits_of_this_server(url: str) -> None:
    schema = requests.get(f"{url}/openapi.json", timeout=10).json()
    fields = schema["components"]["schemas"]["GenerationRequest"]["properties"]
    assert fields["n"]["maximum"] == 3
    assert fields["prompt"]["maxLength"] == 50
    assert fields["size"]["enum"] == ["auto", "16x16", "32x16"]
    body = schema["paths"]["/v1/images/generations"]["post"]["requestBody"]["content"]["application/json"]
    for example in body["examples"].values():
        assert ask(url, example["value"]).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize("key", ["", "sesame"])
def test_schemathesis_finds_nothing(tiny_student: Path, tmp_path: Path, key: str) -> None:
    limits = {"max_steps": 3, "max_images": 2, "max_prompt_chars": 40, "sizes": ["16x16", "32x16"]}
    with running(tiny_student, serve_settings(tmp_path, **limits, **({"api_key": key} if key else {}))) as url:
        command = [Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", "--checks", "all"]
        options = ["--max-examples", "40", "--seed", "1", "--no-color", "--generation-database", "none"]
        header = ["--header", f"Authorization: Bearer {key}"] if key else []
        environment = {name: value for name, value in os.environ.items() if name != "CI"}
        done = subprocess.run(
            [*map(str, command), *options, *header],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            timeout=240,
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "4 operations" in done.stdout or "Tested: 4" in done.stdout, done.stdout
