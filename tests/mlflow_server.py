"""A real MLflow server in a process of its own, which can be stopped and started with what it stored."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import requests

from tests.s3 import free_port

ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "a-long-password"}
# No telemetry, as fixtures start before `clean_environment`; no processes for jobs, which nothing here has.
_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


@contextlib.contextmanager
def mlflow_server(
    folder: Path,
    port: int | None = None,
    *,
    database: str | None = None,
    artifacts: str | None = None,
    auth_database: str | None = None,
    **variables: str,
) -> Iterator[str]:
    """Its URL; what it stores lies in ``folder``, unless a database or a place for artifacts is named.

    ``auth_database`` switches basic auth on. The server listens on all addresses of this machine, and answers to those
    that MLflow allows without being told.
    """
    folder.mkdir(parents=True, exist_ok=True)
    port, log = port or free_port(), folder / "log"
    command = [sys.executable, "-m", "mlflow", "server", "--host", "0.0.0.0", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", database or f"sqlite:///{folder}/m.db"]
    command += ["--artifacts-destination", artifacts or str(folder / "artifacts")]
    environment = os.environ | _QUIET | variables
    if auth_database:
        command += ["--app-name", "basic-auth"]
        environment |= _accounts(folder / "auth.ini", auth_database)
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, env=environment, cwd=folder, start_new_session=True
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while not _answers(url):
            assert time.monotonic() < deadline and process.poll() is None, log.read_text()[-2000:]  # noqa: PT018
            time.sleep(0.3)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # and its workers
        process.wait()


def _accounts(file: Path, database: str) -> dict[str, str]:
    """Variables of a server with basic auth, whose accounts are in a database."""
    file.write_text(
        f"[mlflow]\ndefault_permission = READ\ndatabase_uri = {database}\nadmin_username = admin\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 60\n"  # else the password is hashed for every request
    )
    return {
        "MLFLOW_AUTH_CONFIG_PATH": str(file),
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN["MLFLOW_TRACKING_PASSWORD"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "for these tests alone",
    }


def _answers(url: str) -> bool:
    with contextlib.suppress(requests.RequestException):
        return requests.get(f"{url}/health", timeout=2).ok
    return False
