"""Objects under a URI, in a folder or in S3: each is whole or absent, whoever writes it.

    store = open_store("s3://bucket/targets/KEY", settings.storage)
    store.write("states/train-00000.safetensors", data)

A folder publishes by rename (``teefusion.files``), S3 by the PUT or the completed multipart upload itself. Transfers
are boto3's: it retries a request that fails and a body that breaks off, and checks its own checksums. What a reader
trusts it compares with a sha256 of ours nevertheless (``teefusion.shards``).
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from teefusion.errors import NotFoundError, SettingsError, StorageError
from teefusion.files import create_bytes, storage_error, write_bytes
from teefusion.settings import ENV_PREFIX, StorageSettings

_S3 = "s3://"
_FILE = "file://"


class Reader(Protocol):
    """Objects by name, in one folder or under one prefix."""

    uri: str

    def read(self, name: str) -> bytes:
        """The object. Raises NotFoundError where there is none, StorageError where it cannot be had."""
        ...

    def forget(self, name: str) -> bool:
        """Drop a copy held nearer than the object itself; whether there was one, so that reading again may help."""
        ...

    def where(self, name: str) -> str:
        """The object's path or URI, for messages."""
        ...


class Store(Reader, Protocol):
    """Objects that can be written, too."""

    def write(self, name: str, data: bytes) -> None:
        """Publish the object whole, in place of any older one. Raises StorageError."""
        ...

    def create(self, name: str, data: bytes) -> bool:
        """Publish the object if there is none of that name; whether this call did. Raises StorageError."""
        ...

    def download(self, name: str, path: Path) -> None:
        """The object into a file, however large. Raises NotFoundError, StorageError."""
        ...

    def upload(self, name: str, path: Path) -> None:
        """Publish a file, however large, in place of any older object. Raises StorageError."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of the object, none where there is none. Raises StorageError."""
        ...

    def names(self, prefix: str = "") -> list[str]:
        """Names that begin with ``prefix``, sorted. Raises StorageError."""
        ...

    def delete(self, name: str) -> None:
        """Remove the object, if it is there. Raises StorageError."""
        ...


def open_store(uri: str, settings: StorageSettings | None = None) -> Store:
    """The store at a folder, a ``file://`` or an ``s3://bucket/prefix`` URI. Raises SettingsError for any other."""
    if uri.startswith(_S3):
        return S3Store(uri, settings or StorageSettings())
    return FolderStore(local_path(uri))


def is_remote(uri: str) -> bool:
    """Whether a URI names S3 rather than a folder of this machine."""
    return uri.startswith(_S3)


def local_path(uri: str) -> Path:
    """The folder that a plain path or ``file://`` URI names. Raises SettingsError for another scheme."""
    if uri.startswith(_FILE):
        return Path(uri.removeprefix(_FILE))
    if "://" in uri:
        raise SettingsError(f"{uri} is neither a folder, nor file:///folder, nor s3://bucket/prefix.")
    return Path(uri)


def join(uri: str, *names: str) -> str:
    """A URI below another."""
    return "/".join([uri.rstrip("/"), *names])


class FolderStore:
    """A folder. Another process or machine may write there too, on any file system with atomic rename and link."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = str(folder)

    def read(self, name: str) -> bytes:
        """See ``Store``."""
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError as error:
            raise NotFoundError(f"{self.where(name)} is missing.") from error
        except OSError as error:
            raise storage_error(error, self.folder / name, "read") from error

    def write(self, name: str, data: bytes) -> None:
        """See ``Store``."""
        write_bytes(self.folder / name, data)

    def create(self, name: str, data: bytes) -> bool:
        """See ``Store``."""
        return create_bytes(self.folder / name, data)

    def download(self, name: str, path: Path) -> None:
        """See ``Store``."""
        _copy(self.folder / name, path)

    def upload(self, name: str, path: Path) -> None:
        """See ``Store``."""
        target = self.folder / name
        temporary = target.with_name(f".{target.name}.{os.getpid()}")
        _copy(path, temporary)
        os.replace(temporary, target)

    def size(self, name: str) -> int | None:
        """See ``Store``."""
        try:
            return (self.folder / name).stat().st_size
        except FileNotFoundError:
            return None
        except OSError as error:
            raise storage_error(error, self.folder / name, "read") from error

    def names(self, prefix: str = "") -> list[str]:
        """See ``Store``; hidden files, which are writes under way, are left out."""
        found = (p for p in self.folder.rglob("*") if p.is_file() and not p.name.startswith("."))
        return sorted(name for p in found if (name := p.relative_to(self.folder).as_posix()).startswith(prefix))

    def delete(self, name: str) -> None:
        """See ``Store``."""
        try:
            (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise storage_error(error, self.folder / name, "delete") from error

    def forget(self, name: str) -> bool:
        """See ``Reader``; nothing is nearer."""
        return False

    def where(self, name: str) -> str:
        """See ``Reader``."""
        return str(self.folder / name)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[BinaryIO]:
    """A new file for writing, its folders made. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            yield stream
    except OSError as error:
        raise storage_error(error, path, "write") from error


def _copy(source: Path, target: Path) -> None:
    try:
        with source.open("rb") as stream, _writable(target) as copy:
            shutil.copyfileobj(stream, copy)
    except FileNotFoundError as error:
        raise NotFoundError(f"{source} is missing.") from error


class S3Credentials(BaseSettings):
    """Read where a client is made, and kept nowhere else: settings travel in files, manifests and pipelines.

    Unset, boto3 looks where it always does: AWS_* variables, ~/.aws, the machine's or service account's role.
    """

    model_config = SettingsConfigDict(env_prefix=f"{ENV_PREFIX}S3_", extra="ignore")

    access_key_id: SecretStr | None = None
    secret_access_key: SecretStr | None = None
    session_token: SecretStr | None = None


class S3Store:
    """A prefix of a bucket."""

    def __init__(self, uri: str, settings: StorageSettings) -> None:
        self.bucket, _, self._prefix = uri.removeprefix(_S3).rstrip("/").partition("/")
        if not self.bucket:
            raise SettingsError(f"{uri} names no bucket: write s3://bucket/prefix.")
        self.uri = join(f"{_S3}{self.bucket}", *filter(None, [self._prefix]))
        self._settings = settings
        self._bucket_exists = False  # not known yet

    @cached_property
    def _client(self) -> Any:
        return make_client(self._settings)

    @cached_property
    def _transfer(self) -> Any:
        from boto3.s3.transfer import TransferConfig

        part = self._settings.multipart_mb * 2**20
        attempts = self._settings.max_attempts
        return TransferConfig(multipart_threshold=part, multipart_chunksize=part, num_download_attempts=attempts)

    def read(self, name: str) -> bytes:
        """See ``Store``."""
        buffer = io.BytesIO()
        with self._errors("read", name):
            self._client.download_fileobj(self.bucket, self._key(name), buffer, Config=self._transfer)
        self._bucket_exists = True
        return buffer.getvalue()

    def write(self, name: str, data: bytes) -> None:
        """See ``Store``."""
        with self._errors("write", name):
            self._client.upload_fileobj(io.BytesIO(data), self.bucket, self._key(name), Config=self._transfer)

    def download(self, name: str, path: Path) -> None:
        """See ``Store``."""
        with self._errors("read", name), _writable(path) as stream:
            self._client.download_fileobj(self.bucket, self._key(name), stream, Config=self._transfer)

    def upload(self, name: str, path: Path) -> None:
        """See ``Store``."""
        with self._errors("write", name):
            self._client.upload_file(str(path), self.bucket, self._key(name), Config=self._transfer)

    def create(self, name: str, data: bytes) -> bool:
        """See ``Store``. Of a server without conditional writes, two at once may both be told yes."""
        from botocore.exceptions import ClientError

        with self._errors("write", name):
            try:
                self._client.put_object(Bucket=self.bucket, Key=self._key(name), Body=data, IfNoneMatch="*")
                return True
            except ClientError as error:
                code = error.response["Error"]["Code"]
                if code == "ConditionalRequestConflict":  # another is writing it at this moment
                    return False
                if code == "NotImplemented":
                    return self._create_unconditionally(name, data)
                if code != "PreconditionFailed":
                    raise
        # The answer to an earlier attempt of this very call may have been lost on its way.
        return self.read(name) == data

    def _create_unconditionally(self, name: str, data: bytes) -> bool:
        if self.size(name) is not None:
            return False
        self.write(name, data)
        return True

    def size(self, name: str) -> int | None:
        """See ``Store``."""
        try:
            with self._errors("look up", name):
                return int(self._client.head_object(Bucket=self.bucket, Key=self._key(name))["ContentLength"])
        except NotFoundError:
            return None

    def names(self, prefix: str = "") -> list[str]:
        """See ``Store``."""
        start = self._key("")
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            return sorted(item["Key"].removeprefix(start) for page in pages for item in page.get("Contents", []))

    def delete(self, name: str) -> None:
        """See ``Store``."""
        with self._errors("delete", name):
            self._client.delete_object(Bucket=self.bucket, Key=self._key(name))

    def forget(self, name: str) -> bool:
        """See ``Reader``; nothing is nearer."""
        return False

    def where(self, name: str) -> str:
        """See ``Reader``."""
        return join(self.uri, name)

    def _key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @contextlib.contextmanager
    def _errors(self, action: str, name: str) -> Any:
        """What boto3 raises, as NotFoundError or StorageError."""
        from boto3.exceptions import Boto3Error
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            yield
        except (ClientError, BotoCoreError, Boto3Error, OSError) as error:
            told = s3_error(error, action, self.where(name), self._settings)
            if isinstance(told, NotFoundError) and not self._bucket_exists:
                self._require_bucket(action, name)
            raise told from error

    def _require_bucket(self, action: str, name: str) -> None:
        """A HEAD request's answer does not say whether it is the object that is missing, or its bucket."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            self._client.head_bucket(Bucket=self.bucket)
        except (ClientError, BotoCoreError) as error:
            if isinstance(error, ClientError) and error.response["Error"]["Code"] in _MISSING:
                error.response["Error"]["Code"] = "NoSuchBucket"
            raise s3_error(error, action, self.where(name), self._settings) from error
        self._bucket_exists = True


def make_client(settings: StorageSettings) -> Any:
    """A boto3 S3 client. Raises SettingsError for an endpoint that is no URL."""
    import boto3
    from botocore.config import Config

    credentials = S3Credentials()
    secrets = {f"aws_{name}": value.get_secret_value() for name, value in credentials if isinstance(value, SecretStr)}
    config = Config(
        retries={"mode": "adaptive", "total_max_attempts": settings.max_attempts},
        connect_timeout=settings.connect_timeout_s,
        read_timeout=settings.read_timeout_s,
        s3={"addressing_style": settings.addressing_style},
        max_pool_connections=32,
    )
    try:
        # A session of its own: boto3's default one remembers the credentials that it found first.
        return boto3.Session().client(
            "s3", endpoint_url=settings.endpoint_url, region_name=settings.region, config=config, **secrets
        )
    except ValueError as error:
        raise SettingsError(
            f"storage.endpoint_url {settings.endpoint_url!r} cannot be used: {error}. Write http(s)://host[:port]."
        ) from error


_CREDENTIALS = "TEEFUSION_S3_ACCESS_KEY_ID and TEEFUSION_S3_SECRET_ACCESS_KEY, or AWS's own variables"
_ADVICE = {
    "NoSuchBucket": "The bucket does not exist. Create it, or correct storage.uri",
    "AccessDenied": "Permission denied. These credentials need s3:GetObject, PutObject, DeleteObject and ListBucket",
    "InvalidAccessKeyId": f"The access key is unknown. Set {_CREDENTIALS}",
    "SignatureDoesNotMatch": f"The secret key is wrong. Set {_CREDENTIALS}",
    "ExpiredToken": f"The session token has expired. Renew it ({_CREDENTIALS})",
    "RequestTimeTooSkewed": "This machine's clock and the server's differ. Synchronise the clock (NTP)",
    "PermanentRedirect": "The bucket lies in another region. Set storage.region",
    "AuthorizationHeaderMalformed": "The bucket lies in another region. Set storage.region",
    "SlowDown": "The server asks for fewer requests. Run again later: what is published is kept",
}
_BY_STATUS = {403: "AccessDenied", 301: "PermanentRedirect", 503: "SlowDown"}
_MISSING = frozenset({"NoSuchKey", "404", "NotFound"})


def s3_error(error: Exception, action: str, where: str, settings: StorageSettings) -> StorageError:
    """What went wrong, where, and what to do, of anything that boto3 raises."""
    from botocore.exceptions import (
        ClientError,
        ConnectionError,  # botocore's
        EndpointConnectionError,
        HTTPClientError,
        NoCredentialsError,
        PartialCredentialsError,
    )

    cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
    server = settings.endpoint_url or "AWS"
    if isinstance(cause, ClientError):
        code = str(cause.response["Error"].get("Code", ""))
        if code in _MISSING:
            return NotFoundError(f"{where} is missing.")
        status = cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        advice = _ADVICE.get(code) or _ADVICE.get(_BY_STATUS.get(status, ""))
        message = str(cause.response["Error"].get("Message", "")).rstrip(".")
        text = advice or f"{server} answered {code or status}: {message}"
    elif isinstance(error, NoCredentialsError | PartialCredentialsError):
        text = f"There are no credentials. Set {_CREDENTIALS}"
    elif isinstance(error, EndpointConnectionError | ConnectionError | HTTPClientError | OSError):
        text = (
            f"{server} cannot be reached ({type(error).__name__}). Check storage.endpoint_url and the network, then "
            "run again: what is published is kept"
        )
    else:
        text = str(error).rstrip(".")
    return StorageError(f"Cannot {action} {where}: {text}.")
