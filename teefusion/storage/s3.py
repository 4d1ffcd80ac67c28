"""A prefix of an S3 bucket as a store, and the client it speaks by."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from functools import cached_property
from operator import itemgetter
from pathlib import Path
from typing import Any, BinaryIO

from pydantic import SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from teefusion.errors import NotFoundError, SettingsError
from teefusion.files import storage_error
from teefusion.settings import ENV_PREFIX, StorageSettings
from teefusion.storage.s3_errors import MISSING, s3_error
from teefusion.storage.uris import S3, join


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
        self.bucket, _, self._prefix = uri.removeprefix(S3).rstrip("/").partition("/")
        if not self.bucket:
            raise SettingsError(f"{uri} names no bucket: write s3://bucket/prefix.")
        self.uri = join(f"{S3}{self.bucket}", *filter(None, [self._prefix]))
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

    def read_large(self, name: str) -> memoryview:
        """See ``Store``."""
        return memoryview(self.read(name))

    def write(self, name: str, data: bytes) -> None:
        """See ``Store``."""
        with self._errors("write", name):
            self._client.upload_fileobj(io.BytesIO(data), self.bucket, self._key(name), Config=self._transfer)

    def download(self, name: str, path: Path) -> None:
        """The object into a file, however large. Raises NotFoundError, StorageError."""
        with self._errors("read", name), _writable(path) as stream:
            self._client.download_fileobj(self.bucket, self._key(name), stream, Config=self._transfer)

    def upload(self, name: str, path: Path) -> None:
        """Publish a file, however large, in place of any older object. Raises StorageError."""
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
        try:
            return self.read(name) == data  # the answer to an earlier attempt of this very call may have been lost
        except NotFoundError:  # another's, and removed since: claims are, as soon as the work is done
            return False

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

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """See ``Store``."""
        start = self._key("")
        with self._errors("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=self._key(prefix))
            items = [item for page in pages for item in page.get("Contents", [])]
        return {item["Key"].removeprefix(start): item["Size"] for item in sorted(items, key=itemgetter("Key"))}

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
            if isinstance(error, ClientError) and error.response["Error"]["Code"] in MISSING:
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


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[BinaryIO]:
    """A new file for writing, its folders made. Raises StorageError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            yield stream
    except OSError as error:
        raise storage_error(error, path, "write") from error
