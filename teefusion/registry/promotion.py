"""Move the champion: promote, roll back, and finish what an earlier command was killed over.

A move is decided by the journal (``journal.py``) and then carried out on the aliases, by whoever comes first: this
command, or the next one. What is guaranteed, and what cannot be, is in docs/registry.md.
"""

from __future__ import annotations

import getpass
import logging
import os
import time
import uuid
from dataclasses import dataclass
from typing import Any

from teefusion.errors import RegistryError, TrackingError, UsageError
from teefusion.registry.journal import Action, Entry
from teefusion.registry.sources import digest_at, fetch_verified
from teefusion.registry.store import ModelStore, State, require_version
from teefusion.registry.versions import Version, require_digest
from teefusion.settings import Settings
from teefusion.tracking import connect

log = logging.getLogger(__name__)
_LONGEST_LINE = 20
"""Versions that rollbacks can return to, one after the other."""
_MARK_EXPIRES_S = 600.0
"""Far longer than a request to MLflow takes with all its retries, and than clocks differ."""


@dataclass(frozen=True)
class Move:
    """What a command did. ``changed`` is false where the version was champion already."""

    name: str
    champion: str
    previous: str | None
    changed: bool

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"name": self.name, "champion": self.champion, "previous": self.previous, "changed": self.changed}


def promote(settings: Settings, name: str, number: str, *, override: str | None = None) -> Move:
    """Make a version champion; the one before becomes ``previous``.

    Refuses one whose gate did not pass or whose files are not those registered, unless ``override`` says why: that is
    recorded with the digest found, and such a version then loads by alias. Raises RegistryError where it is refused or
    somebody else moved the champion at the same time, TrackingError, StorageError.
    """
    if override is not None and not override.strip():
        raise UsageError('An override takes a reason, which is recorded: --override "REASON".')
    store, token = ModelStore(connect(settings), settings, name), uuid.uuid4().hex
    state = settle(store, token)
    version = require_version(state, name, number)
    if state.champion == number and not state.moved_by_hand and not override:
        return Move(name, number, _below(state.line), changed=False)
    digest = digest_at(settings, version.source) if override else _check(settings, version)
    line = (number, *_champions(state))
    return _decide(store, state, token, "promote", line, reason=override or "", digest=digest)


def rollback(settings: Settings, name: str) -> Move:
    """Give ``champion`` back to the version before, and again to the one before that.

    Where the alias was moved by hand, back to the last champion that was promoted. Raises RegistryError where there is
    none, or it may not be loaded; see ``promote``.
    """
    store, token = ModelStore(connect(settings), settings, name), uuid.uuid4().hex
    state = settle(store, token)
    line = state.line if state.moved_by_hand else state.line[1:]
    if not line:
        raise RegistryError(
            f"There is nothing to roll {name} back to: no version was champion before "
            f"{'version ' + state.champion if state.champion else 'now'}. Promote one: 'teefusion promote {name} "
            "VERSION'."
        )
    _check(settings, require_version(state, name, line[0]))
    return _decide(store, state, token, "rollback", line)


def settle(store: ModelStore, token: str) -> State:
    """Put the aliases where the journal's last entry wants them, if marks say that this is not done; read the model.

    Aliases that differ and no mark: they were moved by hand, and are left alone. After own writes all is read again, as
    a newer entry may have been carried out meanwhile, over which these came too late.
    """
    seen: State | None = None
    while True:
        state = store.read()
        last, override = state.last, state.missing_override()
        if last is None or not state.marked:
            if not state.moved_by_hand or state == seen:
                return state
            seen = state  # a second look, as a mark may have come between reading the journal and the aliases
            continue
        if not state.misplaced() and override is None:
            _unmark(store, state, token)
            return state
        if token not in last.marks:
            log.info("%s: moving the aliases as %s decided (entry %d).", store.name, last.by, last.number)
            store.mark(last, token)
        if override is not None:
            store.set_override(last.champion, override)
        for alias, number in state.misplaced().items():
            store.set_alias(alias, number)


def _unmark(store: ModelStore, state: State, token: str) -> None:
    """Take this command's marks away, and those of commands that cannot be at work any more."""
    for entry in state.entries:
        for of, at in entry.marks.items():
            if of == token or time.time() - at > _MARK_EXPIRES_S:
                store.unmark(entry, of)


def _champions(state: State) -> tuple[str, ...]:
    """The line that a promotion goes on top of: the journal's, and above it a champion that somebody made by hand.

    One that may not be champion is passed over: no rollback shall return to it.
    """
    by_hand = state.versions.get(state.champion or "") if state.moved_by_hand else None
    if by_hand is None or by_hand.objection():
        return state.line
    return (by_hand.number, *state.line)


def _check(settings: Settings, version: Version) -> str:
    """The digest of a version that may become champion. Raises RegistryError for any other."""
    how = f'teefusion promote {version.name} {version.number} --override "REASON"'
    if objection := version.objection():
        raise RegistryError(
            f"{version} cannot become champion: {objection}. Promote another version ('teefusion models "
            f"{version.name}'), or record why this one shall be used all the same: {how}"
        )
    digest = require_digest(version)
    fetch_verified(settings, version.source, digest, what=str(version))
    return digest


def _decide(
    store: ModelStore,
    state: State,
    token: str,
    action: Action,
    line: tuple[str, ...],
    *,
    reason: str = "",
    digest: str = "",
) -> Move:
    """Write the entry; if it counts, carry it out. Raises RegistryError where another counts in its place."""
    entry = Entry(
        action=action,
        line=line[:_LONGEST_LINE],
        after=state.last.number if state.last else 0,
        by=_who(),
        token=token,
        marks={token: time.time()},
        reason=reason,
        digest=digest if reason else "",
        found=(state.champion or "") if state.moved_by_hand else "",
    )
    failure: TrackingError | None = None
    try:
        store.write_entry(entry)
    except TrackingError as error:  # the answer may have been lost, and the entry be there
        failure = error
    settled = settle(store, token)
    if any(found.token == token for found in settled.entries):
        return Move(store.name, entry.champion, _below(entry.line), changed=True)
    won = next((found for found in settled.entries if found.number > entry.after), None)
    if won is None:
        raise failure or TrackingError(f"MLflow took the move of {store.name} and does not show it. Run again.")
    raise RegistryError(
        f"{won.by} moved the champion of {store.name} to version {won.champion} at the same time, so your {action} to "
        f"version {entry.champion} did not happen. Look at 'teefusion history {store.name}', and run it again if you "
        "still want it."
    )


def _below(line: tuple[str, ...]) -> str | None:
    return line[1] if len(line) > 1 else None


def _who() -> str:
    """The name that goes into the journal: MLflow's account, else the user of this machine."""
    if account := os.environ.get("MLFLOW_TRACKING_USERNAME"):
        return account
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return f"uid {os.getuid()}"
