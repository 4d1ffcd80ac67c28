"""Before an MLflow server starts: bring the database's schema up to date, and write the settings of basic auth.

Runs in the MLflow image as an init container. Replicas that start together take turns.
"""

import configparser
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlflow.db
from mlflow.store.db.utils import create_sqlalchemy_engine_with_retry
from sqlalchemy import Engine, text

# Any number, as long as all replicas name the same.
LOCK = 0x7EEF


@contextmanager
def turn(engine: Engine) -> Iterator[None]:
    """While no other replica migrates; PostgreSQL frees the lock when a pod dies."""
    if engine.dialect.name != "postgresql":
        yield
        return
    with engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": LOCK})
        yield


def write_auth_settings(path: Path, uri: str, default_permission: str) -> None:
    """The file that MLFLOW_AUTH_CONFIG_PATH names; the administrator comes from variables."""
    settings = configparser.RawConfigParser()
    # MLflow reads it with interpolation, so that a % (as in an encoded password) is written twice.
    settings["mlflow"] = {"default_permission": default_permission, "database_uri": uri.replace("%", "%%")}
    path.touch(mode=0o600)
    with path.open("w") as file:
        settings.write(file)


def main() -> None:
    uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
    auth = os.environ.get("MLFLOW_AUTH_CONFIG_PATH")
    engine = create_sqlalchemy_engine_with_retry(uri)  # for a minute or two: a new database takes its time
    with turn(engine):
        mlflow.db.commands.main(["upgrade", uri], standalone_mode=False)
        if auth:
            write_auth_settings(Path(auth), uri, os.environ["DEFAULT_PERMISSION"])
            from mlflow.server.auth.db import cli  # reads that file when imported

            cli.commands.main(["upgrade", "--url", uri], standalone_mode=False)
    print("The database is ready.", file=sys.stderr)


if __name__ == "__main__":
    main()
