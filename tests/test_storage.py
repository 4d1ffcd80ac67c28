"""Stores: whole or absent in a folder and in S3, over a bad network too, and every failure told in words."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from teefusion.cache import CachedReader
from teefusion.errors import NotFoundError, SettingsError, StorageError
from teefusion.manifests import FileRecord
from teefusion.settings import StorageSettings, load_settings
from teefusion.shards import read_verified
from teefusion.storage import FolderStore, S3Store, Store, open_store
from tests.s3 import BUCKET, ENVIRONMENT, FaultProxy, free_port, s3_server

Open = Callable[..., Store]


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def s3(url: str, uri: str = f"s3://{BUCKET}/set", **options: object) -> Store:
    return open_store(uri, StorageSettings(endpoint_url=url, addressing_style="path", **options))


@pytest.fixture(params=["folder", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, server: str, credentials: None) -> Store:
    name = request.node.name.replace("[", "-").rstrip("]")
    return FolderStore(tmp_path / "set") if request.param == "folder" else s3(server, f"s3://{BUCKET}/{name}")


def test_objects_come_back_as_they_were_written(store: Store) -> None:
    assert store.size("a/b.bin") is None
    with pytest.raises(NotFoundError, match=r"a/b.bin is missing"):
        store.read("a/b.bin")
    store.write("a/b.bin", b"first")
    store.write("a/b.bin", b"second")
    store.write("a/c.bin", b"")
    store.write("d.bin", b"d")
    assert store.read("a/b.bin") == b"second"
    assert (store.size("a/b.bin"), store.size("a/c.bin")) == (6, 0)
    assert list(store.sizes()) == ["a/b.bin", "a/c.bin", "d.bin"]
    assert list(store.sizes("a/")) == ["a/b.bin", "a/c.bin"]
    store.delete("a/b.bin")
    store.delete("a/b.bin")
    assert list(store.sizes("a/")) == ["a/c.bin"]


def test_one_of_many_creates(store: Store) -> None:
    won: list[int] = []

    def create(k: int) -> None:
        if store.create("claim", str(k).encode()):
            won.append(k)

    threads = [threading.Thread(target=create, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert store.read("claim") == str(won[0]).encode()


def test_what_another_created_and_removed_at_once_is_not_ours(
    server: str, credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = s3(server, f"s3://{BUCKET}/removed")
    assert store.create("claim", b"another")
    read = store.read

    def read_too_late(name: str) -> bytes:
        store.delete(name)
        return read(name)

    monkeypatch.setattr(store, "read", read_too_late)
    assert not store.create("claim", b"ours")


def test_large_objects_travel_in_parts(server: str, credentials: None) -> None:
    store, data = s3(server, multipart_mb=5), bytes(range(256)) * 50_000
    store.write("large", data)
    assert store.read("large") == data
    client = boto3.client("s3", endpoint_url=server)
    assert client.head_object(Bucket=BUCKET, Key="set/large")["ETag"].strip('"').endswith("-3")


def test_over_a_bad_network_nothing_is_lost_or_changed(server: str, credentials: None) -> None:
    """5 % of requests fail, 2 % break off, all wait: 200 objects, some in parts, come back byte for byte."""
    with FaultProxy(server, errors=0.05, resets=0.02, latency_s=0.002) as proxy:
        store = s3(proxy.url, f"s3://{BUCKET}/bad", multipart_mb=5, max_attempts=8)
        data = {f"{k:03d}": bytes([k]) * (12_000_000 if k % 50 == 0 else 1000 + k) for k in range(200)}
        created = [store.create(f"claim/{name}", name.encode()) for name in data]
        for name, value in data.items():
            store.write(name, value)
        assert {name: store.read(name) for name in data} == data
        assert list(store.sizes("claim/")) == [f"claim/{name}" for name in data]
        assert all(created)  # a lost answer is not taken for another worker's claim
        assert proxy.refused > 20
        assert proxy.broken > 5


def test_a_server_without_conditional_writes_is_asked_first(
    server: str, credentials: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from botocore.exceptions import ClientError

    store = s3(server, f"s3://{BUCKET}/old")
    assert isinstance(store, S3Store)

    put = store._client.put_object

    def old(**options: object) -> object:
        if "IfNoneMatch" in options:
            raise ClientError({"Error": {"Code": "NotImplemented", "Message": ""}}, "PutObject")
        return put(**options)

    monkeypatch.setattr(store._client, "put_object", old)
    assert store.create("x", b"1")
    assert not store.create("x", b"2")
    assert store.read("x") == b"1"


def _stop(url: str) -> Store:
    return s3(f"http://127.0.0.1:{free_port()}", max_attempts=1)


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        (lambda url: s3(url, "s3://nowhere/set"), r"The bucket does not exist\. Create it, or correct storage\.uri"),
        (_stop, r"cannot be reached .*Check storage\.endpoint_url and the network"),
    ],
    ids=["no such bucket", "no server"],
)
def test_what_cannot_work_says_why(
    server: str, credentials: None, opened: Callable[[str], Store], message: str
) -> None:
    with pytest.raises(StorageError, match=message):
        opened(server).write("x", b"")
    with pytest.raises(StorageError, match=message):
        opened(server).read("x")


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("AccessDenied", 403, "Permission denied. These credentials need s3:GetObject"),
        ("403", 403, "Permission denied"),
        ("InvalidAccessKeyId", 403, "The access key is unknown. Set TEEFUSION_S3_ACCESS_KEY_ID"),
        ("SignatureDoesNotMatch", 403, "The secret key is wrong"),
        ("RequestTimeTooSkewed", 403, r"clock and the server's differ. Synchronise the clock"),
        ("ExpiredToken", 400, "The session token has expired"),
        ("PermanentRedirect", 301, "another region. Set storage.region"),
        ("SlowDown", 503, "asks for fewer requests"),
        ("XAmzWhatever", 400, "answered XAmzWhatever: what it says"),
    ],
)
def test_an_answer_of_the_server_becomes_advice(
    server: str, credentials: None, monkeypatch: pytest.MonkeyPatch, code: str, status: int, message: str
) -> None:
    from botocore.exceptions import ClientError

    store = s3(server)
    assert isinstance(store, S3Store)

    def refuse(**_: object) -> None:
        answer = {"Error": {"Code": code, "Message": "what it says"}, "ResponseMetadata": {"HTTPStatusCode": status}}
        raise ClientError(answer, "HeadObject")  # type: ignore[arg-type]

    monkeypatch.setattr(store._client, "head_object", refuse)
    with pytest.raises(StorageError, match=f"Cannot look up s3://{BUCKET}/set/x: .*{message}"):
        store.size("x")


def test_missing_credentials_are_named(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, credentials: None
) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    with pytest.raises(StorageError, match="There are no credentials. Set TEEFUSION_S3_ACCESS_KEY_ID"):
        s3(server).read("x")


def test_credentials_of_ours_reach_the_client_and_no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEEFUSION_S3_ACCESS_KEY_ID", "our-key")
    monkeypatch.setenv("TEEFUSION_S3_SECRET_ACCESS_KEY", "our-secret")
    settings = load_settings(overrides={"storage.uri": "s3://b/p", "storage.region": "eu-west-1"})
    assert "our-" not in settings.to_json()
    store = open_store("s3://b/p", settings.storage)
    assert isinstance(store, S3Store)
    assert store._client._request_signer._credentials.access_key == "our-key"


@pytest.mark.parametrize("uri", ["gs://bucket/x", "s3://", "https://host/x"])
def test_a_uri_of_another_kind_is_refused(uri: str) -> None:
    with pytest.raises(SettingsError, match=r"s3://bucket/prefix"):
        open_store(uri)


def test_an_endpoint_that_is_no_url_is_refused(credentials: None) -> None:
    with pytest.raises(SettingsError, match=r"storage.endpoint_url 'no url' cannot be used"):
        s3("no url").read("x")


def test_where_a_file_uri_lies(tmp_path: Path) -> None:
    assert open_store(f"file://{tmp_path}").uri == str(tmp_path)


class _Counting(FolderStore):
    reads = 0

    def read_large(self, name: str) -> memoryview:
        self.reads += 1
        return super().read_large(name)


def test_the_cache_reads_once_and_keeps_within_its_bounds(tmp_path: Path) -> None:
    store = _Counting(tmp_path / "far")
    for k in range(10):
        store.write(str(k), bytes([k]) * 100)
    cache = CachedReader(store, tmp_path / "near", limit_bytes=450)
    for k in (0, 1, 0, 1):
        assert cache.read_large(str(k)) == bytes([k]) * 100
    assert store.reads == 2
    for k in range(10):
        assert cache.read_large(str(k)) == bytes([k]) * 100
    kept = [path for path in (tmp_path / "near").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in kept) <= 450
    assert len(kept) == 4


def test_a_manifest_that_was_written_anew_is_read_anew(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "far")
    cache = CachedReader(store, tmp_path / "near", limit_bytes=450)
    for text in (b"first", b"after a repair"):
        store.write("manifest.json", text)
        assert cache.read("manifest.json") == text


def test_without_room_for_copies_all_is_read_from_the_store(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = _Counting(tmp_path / "far")
    store.write("shard", b"shard")
    (tmp_path / "near").write_bytes(b"a file where the folder would be")
    cache = CachedReader(store, tmp_path / "near", limit_bytes=450)
    assert [cache.read_large("shard") for _ in range(3)] == [b"shard"] * 3
    assert store.reads == 3
    assert caplog.text.count("Going on without the cache; storage.cache_gb says") == 1


def test_making_room_leaves_writes_under_way_alone_but_not_what_kills_left(tmp_path: Path) -> None:
    store = FolderStore(tmp_path / "far")
    for name in "ab":
        store.write(name, bytes(400))
    cache = CachedReader(store, tmp_path / "near", limit_bytes=450)
    cache.read_large("a")
    (copy,) = (path for path in (tmp_path / "near").rglob("*") if path.is_file())
    other, left = copy.with_name(".of-another-rank"), copy.with_name(".of-a-killed-one")
    for path in (other, left):
        path.write_bytes(bytes(400))
    os.utime(left, (0, 0))
    cache.read_large("b")
    assert {path.name for path in copy.parent.iterdir()} == {"b", other.name}


def test_a_damaged_copy_is_fetched_again_and_a_damaged_original_is_not_used(tmp_path: Path) -> None:
    import hashlib

    from teefusion.errors import IntegrityError

    store = _Counting(tmp_path / "far")
    data = b"shard" * 100
    store.write("s.safetensors", data)
    record = FileRecord(name="s", rows=1, bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    cache = CachedReader(store, tmp_path / "near", limit_bytes=10**6)
    assert read_verified(cache, record) == data
    (copy,) = (path for path in (tmp_path / "near").rglob("*") if path.is_file())
    copy.write_bytes(data[:-1] + b"!")
    assert read_verified(cache, record) == data
    assert store.reads == 2
    store.write("s.safetensors", data[:-1] + b"!")
    copy.unlink()
    with pytest.raises(IntegrityError, match="is corrupt"):
        read_verified(cache, record)
