"""A model's versions, aliases and journal in MLflow: each call that reads or writes them, and nothing else."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from teefusion.errors import RegistryError
from teefusion.registry.journal import JOURNAL_TAG, MARK, Entry, counted, journal_name
from teefusion.registry.versions import CHAMPION, OVERRIDE_TAG, PREVIOUS, Version
from teefusion.settings import Settings
from teefusion.tracking import mlflow_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

_PAGE = 1000
_INSERTED_TWICE = ("UniqueViolation", "UNIQUE constraint failed", "Duplicate entry")  # PostgreSQL, SQLite, MySQL


@dataclass(frozen=True)
class State:
    """A model as it was read: first the journal, then versions and aliases."""

    entries: tuple[Entry, ...]
    """Those that count, in order."""
    versions: Mapping[str, Version]
    aliases: Mapping[str, str]

    @property
    def last(self) -> Entry | None:
        """The entry that decides."""
        return self.entries[-1] if self.entries else None

    @property
    def line(self) -> tuple[str, ...]:
        """The champion and what rollbacks return to, by the journal; without versions that were deleted since."""
        return tuple(number for number in (self.last.line if self.last else ()) if number in self.versions)

    @property
    def champion(self) -> str | None:
        """What the alias says."""
        return self.aliases.get(CHAMPION)

    @property
    def moved_by_hand(self) -> bool:
        """Whether the alias names another version than the journal's champion."""
        return self.champion != (self.line[0] if self.line else None)

    @property
    def marked(self) -> bool:
        """Whether aliases are being written, or were when a command was killed."""
        return any(entry.marks for entry in self.entries)

    def misplaced(self) -> dict[str, str | None]:
        """Aliases that are not where the journal wants them, with where they belong; ``previous`` is moved first."""
        champion, previous, *_ = (*self.line, None, None)
        wanted = {PREVIOUS: previous, CHAMPION: champion}
        return {alias: number for alias, number in wanted.items() if self.aliases.get(alias) != number}

    def missing_override(self) -> str | None:
        """What the last entry wants said on its version, where it is not said yet."""
        if not (self.last and self.last.reason and self.last.champion in self.versions):
            return None
        override = json.dumps({"reason": self.last.reason, "by": self.last.by, "digest": self.last.digest})
        return override if self.versions[self.last.champion].tags.get(OVERRIDE_TAG) != override else None


class ModelStore:
    """One registered model. Every method is one call of MLflow, or reads by several. Raises TrackingError."""

    def __init__(self, client: MlflowClient, settings: Settings, name: str) -> None:
        self._client, self._settings, self.name = client, settings, name

    def read(self) -> State:
        """Everything. Raises RegistryError where there is no such model."""
        entries = self._entries()
        versions = {version.number: version for version in map(Version.of, self._search(self.name))}
        with self._call(missing=f"there is no registered model {self.name}"):
            aliases = {
                alias: str(number) for alias, number in self._client.get_registered_model(self.name).aliases.items()
            }
        return State(entries, versions, aliases)

    def write_entry(self, entry: Entry) -> None:
        """Append to the journal. What MLflow raises leaves open whether the entry was written."""
        with self._call():
            if entry.after == 0:
                ensure_models(self._client, self.name)
            self._client.create_model_version(
                journal_name(self.name),
                source=f"models:/{self.name}/{entry.champion}",
                tags=entry.tags(),
                description=f"{entry.action} to version {entry.champion} by {entry.by}",
            )

    def mark(self, entry: Entry, token: str) -> None:
        """Say on an entry that aliases are about to be written for it."""
        with self._call():
            journal, at = journal_name(self.name), str(time.time())
            self._client.set_model_version_tag(journal, str(entry.number), f"{MARK}{token}", at)

    def unmark(self, entry: Entry, token: str) -> None:
        """Take a mark away."""
        with self._call():
            self._client.delete_model_version_tag(journal_name(self.name), str(entry.number), f"{MARK}{token}")

    def set_override(self, number: str, override: str) -> None:
        """Say on a version that it was promoted against the gate or its digest."""
        with self._call(missing=f"{self.name} has no version {number} any more"):
            _upsert(lambda: self._client.set_model_version_tag(self.name, number, OVERRIDE_TAG, override))

    def set_alias(self, alias: str, number: str | None) -> None:
        """Point an alias to a version, or take it away."""
        with self._call(missing=f"{self.name} has no version {number} any more"):
            if number is None:
                self._client.delete_registered_model_alias(self.name, alias)
            else:
                _upsert(lambda: self._client.set_registered_model_alias(self.name, alias, number))

    def _entries(self) -> tuple[Entry, ...]:
        entries = []
        for version in self._search(journal_name(self.name)):
            with contextlib.suppress(KeyError, ValueError):  # something else that somebody registered there
                entries.append(Entry.of(version))
        return counted(entries)

    def _search(self, name: str) -> list[Any]:
        found: list[Any] = []
        token: str | None = None
        while True:
            with self._call():
                page = self._client.search_model_versions(
                    f"name = '{name}'", max_results=_PAGE, order_by=["version_number ASC"], page_token=token
                )
            found += page
            token = page.token
            if not token:
                return found

    @contextlib.contextmanager
    def _call(self, missing: str | None = None) -> Iterator[None]:
        with mlflow_errors(self._settings, f"read or change {self.name}", missing=missing):
            yield


def _upsert(write: Callable[[], object]) -> None:
    """Write what may be there. Of two who insert it at once, MLflow's database refuses one, which then updates it."""
    from mlflow.exceptions import MlflowException

    try:
        write()
    except MlflowException as error:
        if not any(word in str(error) for word in _INSERTED_TWICE):
            raise
        write()


def ensure_models(client: MlflowClient, name: str) -> None:
    """A registered model and its journal, where they are not there. Raises what MLflow raises.

    Both at once: on a server with accounts, whoever makes a model gives away who may write to it.
    """
    from mlflow.exceptions import MlflowException

    about = f"Who was champion of {name} when, one version a move. Written by teefusion."
    for model, tags, description in ((name, None, None), (journal_name(name), {JOURNAL_TAG: name}, about)):
        try:
            client.create_registered_model(model, tags=tags, description=description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def require_version(state: State, name: str, number: str) -> Version:
    """A version of the state. Raises RegistryError where it is not there."""
    if number not in state.versions:
        there = ", ".join(state.versions) or "none"
        raise RegistryError(f"{name} has no version {number}; there are {there}. See 'teefusion models {name}'.")
    return state.versions[number]
