"""Any number of workers, killed at any moment, make the set that one makes; no published shard is made again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from teefusion import claims
from teefusion.claims import CLAIMS, forget_claims, work_through
from teefusion.errors import IntegrityError
from teefusion.prompts import load_prompt_set
from teefusion.settings import Settings, StorageSettings, settings_from_json
from teefusion.stages.ingest import ingest
from teefusion.storage import FolderStore, Store, open_store
from tests.s3 import BUCKET, ENVIRONMENT, FaultProxy, s3_server

Make = Callable[..., Settings]
MANY = {"targets.trajectories": 80, "targets.heldout_trajectories": 8}


def worker(settings: str, prompts: str, uri: str) -> None:
    """Body of a worker's process; its server was started before a test could set variables."""
    os.environ.update(ENVIRONMENT)
    from teefusion.target_sets import generate_targets

    parsed = settings_from_json(settings)
    generate_targets(parsed, load_prompt_set(Path(prompts)), open_store(uri, parsed.storage))


class Workers:
    """Starts workers as processes of their own, from a server that has imported everything."""

    def __init__(self, settings: Settings, uri: str) -> None:
        self.settings, self.uri = settings, uri
        self.prompts = str(ingest(settings).output)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["teefusion.target_sets", "diffusers.pipelines.stable_diffusion_3"])

    def start(self) -> multiprocessing.process.BaseProcess:
        process = self._context.Process(target=worker, args=(self.settings.to_json(), self.prompts, self.uri))
        process.start()
        return process

    def finish(self, count: int) -> None:
        running = [self.start() for _ in range(count)]
        for process in running:
            process.join(timeout=300)
            assert process.exitcode == 0


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as in every worker: the last bits of sums depend on it."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def files(store: Store) -> dict[str, bytes]:
    return {name: store.read(name) for name in store.sizes()}


def stamps(folder: Path) -> dict[str, int]:
    """When each published shard was written."""
    records = (path for path in folder.glob("*/*.json") if path.parent.name in ("states", "embeddings"))
    return {path.stem: path.with_suffix(".safetensors").stat().st_mtime_ns for path in records}


@pytest.mark.slow
def test_killed_at_fifty_random_moments_it_ends_as_if_undisturbed(make_settings: Make, tmp_path: Path) -> None:
    settings, chance = make_settings(MANY), random.Random(1)
    Workers(settings, str(tmp_path / "undisturbed")).finish(1)
    folder = tmp_path / "killed"
    workers = Workers(settings, str(folder))
    for _ in range(50):
        before = stamps(folder)
        process = workers.start()
        process.join(timeout=chance.uniform(0.1, 3.0))
        if process.pid and process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        after = stamps(folder)
        assert {name: after[name] for name in before} == before
    before = stamps(folder)
    workers.finish(1)
    assert {name: stamps(folder)[name] for name in before} == before
    temporary = [path for path in folder.rglob(".*") if path.is_file()]  # of killed writes; no reader sees them
    assert files(FolderStore(folder)) == files(FolderStore(tmp_path / "undisturbed"))
    assert len(temporary) <= 50


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_workers_that_come_and_go_make_the_set_of_one(make_settings: Make, tmp_path: Path, count: int) -> None:
    settings, chance = make_settings(MANY), random.Random(count)
    Workers(settings, str(tmp_path / "one")).finish(1)
    workers = Workers(settings, str(tmp_path / "many"))
    running = [workers.start() for _ in range(count)]
    for _ in range(3 * count):
        time.sleep(chance.uniform(0.2, 1.0))
        k = chance.randrange(count)
        running[k].kill()
        running[k].join()
        running[k] = workers.start()
    for process in running:
        process.join(timeout=300)
        assert process.exitcode == 0
    assert files(FolderStore(tmp_path / "many")) == files(FolderStore(tmp_path / "one"))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server() as url:
        yield url


@pytest.mark.slow
def test_two_workers_make_the_same_set_in_s3_over_a_bad_network(
    make_settings: Make, tmp_path: Path, server: str
) -> None:
    with FaultProxy(server, errors=0.05, resets=0.02, latency_s=0.005) as proxy:
        storage = {"storage.endpoint_url": proxy.url, "storage.addressing_style": "path"}
        settings = make_settings(MANY | storage)
        Workers(settings, str(tmp_path / "one")).finish(1)
        Workers(settings, f"s3://{BUCKET}/set").finish(2)
        assert proxy.refused > 3
    store = open_store(f"s3://{BUCKET}/set", StorageSettings(endpoint_url=server, addressing_style="path"))
    assert files(store) == files(FolderStore(tmp_path / "one"))


class Shelf:
    """Items that workers publish, in a folder; who made what is kept."""

    def __init__(self, folder: Path) -> None:
        self.store, self.made, self.lock = FolderStore(folder), list[str](), threading.Lock()

    def find(self, name: str) -> bytes | None:
        return self.store.read(name) if self.store.size(name) is not None else None

    def make(self, name: str) -> bytes:
        time.sleep(0.01)
        with self.lock:
            self.made.append(name)
        self.store.write(name, name.encode())
        return name.encode()


def test_threads_share_the_items_and_each_sees_all(tmp_path: Path) -> None:
    shelf, items = Shelf(tmp_path), [f"item-{k}" for k in range(40)]
    results: list[dict[str, bytes]] = []
    threads = [
        threading.Thread(target=lambda: results.append(work_through(shelf.store, items, shelf.find, shelf.make)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [{name: name.encode() for name in items}] * 4
    assert set(shelf.made) == set(items)
    assert len(shelf.made) <= len(items) + 4  # at the very end, one may be taken for lost


def test_the_items_of_the_dead_are_taken(tmp_path: Path) -> None:
    shelf, items = Shelf(tmp_path), ["a", "b", "c"]
    for name in ("a", "c"):
        shelf.store.create(f"{CLAIMS}{name}.0", b"somebody who died")
        shelf.store.create(f"{CLAIMS}{name}.1", b"somebody else who died")
    work_through(shelf.store, items, shelf.find, shelf.make)
    assert sorted(shelf.made) == items


def test_a_worker_that_has_made_nothing_waits_for_those_at_work(tmp_path: Path) -> None:
    shelf, begun = Shelf(tmp_path), threading.Event()

    def make(name: str) -> bytes:
        begun.set()
        time.sleep(1.0)
        return shelf.make(name)

    arguments = (shelf.store, ["only"], shelf.find)
    busy = threading.Thread(target=work_through, args=(*arguments, make))
    busy.start()
    begun.wait()
    assert work_through(*arguments, shelf.make) == {"only": b"only"}
    busy.join()
    assert shelf.made == ["only"]


def test_a_late_worker_knows_from_others_how_long_an_item_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelf = Shelf(tmp_path)
    work_through(shelf.store, ["a"], shelf.find, shelf.make)
    shelf.store.create(f"{CLAIMS}b.0", b"somebody who died")
    with caplog.at_level(logging.INFO):
        work_through(shelf.store, ["a", "b"], shelf.find, shelf.make)
        assert "waiting up to" not in caplog.text  # for the few hundredths of a second of two items
        assert shelf.made == ["a", "b"]
        forget_claims(shelf.store)
        shelf.store.create(f"{CLAIMS}c.0", b"somebody who died")
        monkeypatch.setattr(claims, "_UNKNOWN_S", 0.6)
        work_through(shelf.store, ["c"], shelf.find, shelf.make)
        assert "waiting up to 1 s for 1 shards" in caplog.text


def test_what_is_published_is_not_made(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    shelf.store.write("a", b"a")
    heard: list[tuple[bytes, bool]] = []
    found = work_through(
        shelf.store, ["a", "b"], shelf.find, shelf.make, found=lambda item, made: heard.append((item, made))
    )
    assert found == {"a": b"a", "b": b"b"}
    assert shelf.made == ["b"]
    assert heard == [(b"a", False), (b"b", True)]


def test_ranks_begin_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf(tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    work_through(shelf.store, ["a", "b", "c", "d"], shelf.find, shelf.make)
    assert shelf.made == ["c", "d", "a", "b"]


def test_the_first_workers_batch_size_is_everyones(make_settings: Make, tmp_path: Path) -> None:
    from teefusion.manifests import read_manifest
    from teefusion.target_sets import generate_targets

    settings = make_settings({"targets.batch_size": "auto"})
    prompts, store = load_prompt_set(Path(ingest(settings).output)), FolderStore(tmp_path / "set")
    generate_targets(settings, prompts, store)
    assert read_manifest(store).targets["batch_size"] == settings.targets.shard_trajectories == 4
    plan = store.read("plan.json").replace(b'"batch_size": 4', b'"batch_size": 2')
    other = FolderStore(tmp_path / "other")
    other.write("plan.json", plan)
    generate_targets(settings, prompts, other)
    assert read_manifest(other).targets["batch_size"] == 2


def test_a_plan_of_another_set_is_refused(make_settings: Make, tmp_path: Path) -> None:
    from teefusion.target_sets import generate_targets

    settings = make_settings()
    prompts, store = load_prompt_set(Path(ingest(settings).output)), FolderStore(tmp_path / "set")
    store.write("plan.json", b"{}")
    with pytest.raises(IntegrityError, match="is damaged, or the plan of another set"):
        generate_targets(settings, prompts, store)
