"""Versions of a registered model for tests, and a client that dies, loses answers or dawdles."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from teefusion.files import sha256_folder


class Killed(BaseException):
    """The process is gone: nothing of it runs on."""


def add_version(client: Any, folder: Path, name: str = "m", *, digest: str | None = None, **tags: str) -> Path:
    """Make the next version of a model, of a folder of its own below ``folder``, with these tags."""
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    number = len(client.search_model_versions(f"name = '{name}'")) + 1
    student = folder / f"student-{number}"
    student.mkdir()
    (student / "model_index.json").write_text(f'{{"version": {number}}}')
    client.create_model_version(name, str(student), tags={"student_digest": digest or sha256_folder(student)} | tags)
    return student


def _raise_killed(method: str) -> None:
    raise Killed(method)


class MortalClient:
    """An MLflow client that is killed before its ``dies_at``-th call, by ``die``.

    A share ``loses`` of its answers is lost, and before as many calls it dawdles while others overtake it. ``before``
    is called with each method's name first.
    """

    def __init__(
        self,
        client: Any,
        *,
        dies_at: int | None = None,
        die: Callable[[str], None] = _raise_killed,
        loses: float = 0.0,
        seed: int = 0,
    ) -> None:
        self._client, self.dies_at, self._die, self._loses = client, dies_at, die, loses
        self._random = random.Random(seed)
        self.before: Callable[[str], None] = lambda method: None
        self.calls: list[str] = []
        self.token: str | None = None
        """Of the command's entry in the journal, if it wrote one."""

    def __getattr__(self, method: str) -> Any:
        from mlflow.exceptions import MlflowException

        def call(*arguments: Any, **options: Any) -> Any:
            if self.dies_at is not None and len(self.calls) >= self.dies_at:
                self._die(method)
            self.before(method)
            self.calls.append(method)
            if method == "create_model_version":
                self.token = options["tags"]["token"]
            if self._random.random() < self._loses:
                time.sleep(0.4)
            answer = getattr(self._client, method)(*arguments, **options)
            if self._random.random() < self._loses:
                raise MlflowException("the connection broke before the answer came")
            return answer

        return call
