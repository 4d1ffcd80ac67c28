"""URIs of folders and of S3 prefixes."""

from __future__ import annotations

from pathlib import Path

from teefusion.errors import SettingsError

S3 = "s3://"
_FILE = "file://"


def is_remote(uri: str) -> bool:
    """Whether a URI names S3 rather than a folder of this machine."""
    return uri.startswith(S3)


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
