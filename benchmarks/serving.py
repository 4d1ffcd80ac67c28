"""A server under 64 clients that each ask for the next picture once they have one: errors, waiting, batching, a swap.

    python benchmarks/serving.py [--student FOLDER] [--seconds 120] [--clients 64] [--json]

Two servers run, one that draws up to --batch pictures together and one that draws them alone; they are loaded in turns,
so that what else the machine does is shared. ``--seconds`` is how long the batching server is loaded. Then its champion
moves to another version under the same load. Without --student the bundled teacher is fused as it is: it draws no good
pictures, in the same time. Everything lies in a temporary folder.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

NAME = "benchmark"
PROMPT = "a photo of a red star on a blue background"
ALLOWED = (200, 429)
ROUNDS = 3


@dataclass
class Answers:
    """What clients got: seconds of each picture, and how many answers there were of each kind."""

    seconds: list[float] = field(default_factory=list)
    kinds: collections.Counter[str] = field(default_factory=collections.Counter)
    models: collections.Counter[str] = field(default_factory=collections.Counter)
    elapsed: float = 0.0

    def add(self, other: Answers) -> None:
        """Another round's too."""
        self.seconds += other.seconds
        self.kinds += other.kinds
        self.models += other.models
        self.elapsed += other.elapsed

    @property
    def failed(self) -> int:
        """Answers that are neither a picture nor 429."""
        return sum(count for kind, count in self.kinds.items() if kind not in map(str, ALLOWED))

    @property
    def rate(self) -> float:
        """Pictures a second."""
        return len(self.seconds) / self.elapsed


@contextlib.contextmanager
def load(url: str, clients: int, steps: int) -> Iterator[Answers]:
    """Clients that ask until the block ends; each answer that was begun in it counts."""
    answers, over, lock = Answers(), threading.Event(), threading.Lock()

    def client(number: int) -> None:
        session, asked = requests.Session(), 0
        while not over.is_set():
            body = {"prompt": PROMPT, "seed": number, "guidance_scale": 1 + asked % 5, "num_inference_steps": steps}
            asked, started, model = asked + 1, time.monotonic(), ""
            try:
                answer = session.post(f"{url}/v1/images/generations", json=body, timeout=300)
                kind, model = str(answer.status_code), answer.json().get("model", "")
            except (requests.RequestException, ValueError) as error:
                kind = type(error).__name__
            with lock:
                answers.kinds[kind] += 1
                if kind == "200":
                    answers.seconds.append(time.monotonic() - started)
                    answers.models[model] += 1
            if kind == "429":
                over.wait(float(answer.headers["Retry-After"]))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        over.set()
        for thread in threads:
            thread.join()
        answers.elapsed = time.monotonic() - started


class Served:
    """A server in a process of its own."""

    def __init__(self, workdir: Path, *, batch: int) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "teefusion.cli", "serve", f"models:/{NAME}@champion", "--port", str(port)]
        options = ["--workdir", str(workdir), "--set", f"serve.max_batch={batch}", "--set", "serve.follow_s=1"]
        self._process = subprocess.Popen([*command, *options], stdout=sys.stderr)
        until(lambda: requests.get(f"{self.url}/readyz", timeout=10).ok)

    def metric(self, name: str) -> float:
        """A value at /metrics."""
        text = requests.get(f"{self.url}/metrics", timeout=60).text
        found = re.search(rf"^{name} (\S+)$", text, flags=re.MULTILINE)
        return float(found[1]) if found else 0.0

    @property
    def memory_mb(self) -> float:
        """Resident, in MiB."""
        return self.metric("process_resident_memory_bytes") / 2**20

    def stop(self) -> None:
        """By SIGTERM."""
        self._process.terminate()
        self._process.wait(60)


def until(condition: Any, seconds: float = 300) -> None:
    """Until the condition holds. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(requests.ConnectionError):
            if condition():
                return
        time.sleep(0.1)
    raise TimeoutError(f"not within {seconds} s")


class Versions:
    """A registry in ``workdir`` with versions of the student that may be served."""

    def __init__(self, workdir: Path, student: Path) -> None:
        from teefusion.files import sha256_folder
        from teefusion.settings import load_settings
        from teefusion.tracking import connect

        self._client = connect(load_settings(overrides={"workdir": workdir}))
        self._client.create_registered_model(NAME)
        for _ in range(2):
            tags = {"student_digest": sha256_folder(student), "gate": "passed"}
            self._client.create_model_version(NAME, str(student), tags=tags)

    def champion(self, version: int) -> None:
        """Move the alias."""
        self._client.set_registered_model_alias(NAME, "champion", str(version))


def make_student(folder: Path) -> Path:
    """The bundled teacher, fused and not trained."""
    from teefusion.fusion import make_fusion
    from teefusion.settings import load_settings
    from teefusion.students import make_student, save_student
    from teefusion.teachers import load_teacher

    settings = load_settings(overrides={"teacher.dtype": "float32"})
    teacher = load_teacher(settings.teacher, device="cpu")
    save_student(make_student(teacher.pipeline, make_fusion("affine"), max_sequence_length=0), folder)
    return folder


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Rounds in turns, then the swap."""
    versions = Versions(folder / "work", (options.student or make_student(folder / "student")).resolve())
    versions.champion(1)
    servers = {"batched": Served(folder / "work", batch=options.batch), "alone": Served(folder / "work", batch=1)}
    try:
        totals, speedups, memory = {name: Answers() for name in servers}, [], []
        for number in range(ROUNDS + 1):
            rates = {}
            for name, server in servers.items():
                with load(server.url, options.clients, options.steps) as answers:
                    time.sleep(options.seconds / ROUNDS / (4 if number == 0 else 1))
                if number:  # the first one fills caches
                    totals[name].add(answers)
                rates[name] = answers.rate
            memory.append(servers["batched"].memory_mb)
            speedups.append(rates["batched"] / rates["alone"])
        with load(servers["batched"].url, options.clients, options.steps) as swapped:
            time.sleep(options.seconds / 8)
            versions.champion(2)
            until(lambda: servers["batched"].metric("teefusion_swaps_total") == 1)
            time.sleep(options.seconds / 8)
        after = servers["batched"].memory_mb
    finally:
        for server in servers.values():
            server.stop()
    return report(options, totals, speedups[1:], memory, swapped, after)


def report(
    options: argparse.Namespace,
    totals: dict[str, Answers],
    speedups: list[float],
    memory: list[float],
    swapped: Answers,
    after_mb: float,
) -> dict[str, Any]:
    """What --json prints."""
    batched = totals["batched"]
    percentiles = statistics.quantiles(batched.seconds, n=100)
    return {
        "errors": batched.failed + totals["alone"].failed,
        "p50_seconds": percentiles[49],
        "p99_seconds": percentiles[98],
        "batching_speedup": statistics.median(speedups),
        "batching_speedup_spread": [min(speedups), max(speedups)],
        "pictures_a_second": {name: answers.rate for name, answers in totals.items()},
        "answers": dict(batched.kinds),
        "swap_failures": swapped.failed,
        "swap_answers": dict(swapped.models),
        "swap_longest_seconds": max(swapped.seconds),
        "rss_growth_mb": memory[-1] - memory[0],
        "rss_mb": memory,
        "rss_after_swap_mb": after_mb,
        "clients": options.clients,
        "batch": options.batch,
        "seconds": batched.elapsed,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--student", type=Path, help="student folder (default: the bundled teacher, fused)")
    parser.add_argument("--seconds", type=float, default=120.0, help="load on the batching server (default 120)")
    parser.add_argument("--clients", type=int, default=64, help="default 64")
    parser.add_argument("--steps", type=int, default=20, help="of a picture (default 20)")
    parser.add_argument("--batch", type=int, default=8, help="pictures drawn together (default 8)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    if options.json:
        print(json.dumps(result))
        return
    low, high = result["batching_speedup_spread"]
    print(f"{result['errors']} errors; {result['p50_seconds']:.2f} s median, {result['p99_seconds']:.2f} s p99")
    print(f"{result['batching_speedup']:.2f} times as many pictures as one by one ({low:.2f} to {high:.2f})")
    print(f"swap: {result['swap_failures']} failed, {result['swap_longest_seconds']:.2f} s the longest")
    print(f"memory: {result['rss_growth_mb']:+.0f} MiB over the load, {result['rss_after_swap_mb']:.0f} after the swap")


if __name__ == "__main__":
    main()
