"""A real PostgreSQL server for tests, from Debian's package `postgresql`, with nothing kept."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.s3 import free_port

_ROLE = "teefusion"


def missing() -> str | None:
    """Why there can be no server here; none where there can."""
    if _program("initdb") is None:
        return "PostgreSQL is missing (Debian, Ubuntu: apt-get install postgresql)"
    if os.getuid() == 0 and _account() is None:
        return "PostgreSQL does not run as root, and there is no user postgres"
    return None


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """URL of a server on a free port; ``database`` makes databases in it."""
    port, folder = free_port(), Path(tempfile.mkdtemp(prefix="teefusion-postgres-", dir="/tmp"))
    try:
        if account := _account():
            os.chown(folder, account.pw_uid, account.pw_gid)
        data = folder / "data"
        _run("initdb", "-D", data, "-U", _ROLE, "-A", "trust", "-E", "UTF8", "--no-sync", cwd=folder)
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off -c max_connections=200"
        _run("pg_ctl", "-D", data, "-w", "-t", "60", "-l", folder / "log", "-o", options, "start", cwd=folder)
        try:
            yield f"postgresql+psycopg2://{_ROLE}@127.0.0.1:{port}"
        finally:
            _run("pg_ctl", "-D", data, "-m", "immediate", "stop", cwd=folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def database(server: str, name: str) -> str:
    """URL of a new, empty database."""
    import psycopg2

    connection = psycopg2.connect(f"{server}/postgres".replace("+psycopg2", ""))
    connection.autocommit = True
    with contextlib.closing(connection), connection.cursor() as cursor:
        cursor.execute(f'CREATE DATABASE "{name}"')
    return f"{server}/{name}"


def _program(name: str) -> str | None:
    versions = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), key=lambda path: float(path.parts[4]))
    return str(versions[-1]) if versions else shutil.which(name)


def _account() -> pwd.struct_passwd | None:
    """The user to become, as the server refuses to run as root."""
    if os.getuid() != 0:
        return None
    with contextlib.suppress(KeyError):
        return pwd.getpwnam("postgres")
    return None


def _run(program: str, *arguments: str | Path, cwd: Path) -> None:
    account, path = _account(), _program(program)
    assert path is not None
    become = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {}
    # To files, not pipes: the server inherits them, and a pipe would stay open as long as it runs.
    with (cwd / f"{program}.out").open("wb") as output:
        done = subprocess.run([path, *arguments], cwd=cwd, stdout=output, stderr=output, timeout=120, **become)
    assert done.returncode == 0, (cwd / f"{program}.out").read_text(errors="replace")
