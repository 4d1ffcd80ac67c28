"""A crowd that promotes and rolls back at once: each command is a process, and some processes are killed."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from teefusion.errors import RegistryError, TrackingError
from teefusion.registry import promotion
from teefusion.registry.promotion import promote, rollback, settle
from teefusion.registry.store import ModelStore, State
from teefusion.settings import Settings
from teefusion.tracking import connect
from tests.registered import MortalClient

# What takes seconds to import is there when a process forks.
_PRELOAD = ["tests.crowd", "mlflow", "mlflow.store.tracking.sqlalchemy_store", "psycopg2", "pytest", "__main__"]
_PRELOAD += ["mlflow.store.model_registry.sqlalchemy_store"]
_AT_A_CALL, _AT_ANY_TIME = 0.25, 0.25
"""Shares of the commands that kill themselves before one of their calls, and that are killed from without."""
_LONGEST_LIFE_S = 3.0  # of those; a command takes one to three on two busy cores


def assert_settled(store: ModelStore) -> State:
    """What the next command makes of whatever was left, is all that the journal says."""
    state = settle(store, "the next command")
    assert state.misplaced() == {}
    assert state.missing_override() is None
    return state


@dataclass(frozen=True)
class _Person:
    process: BaseProcess
    answer: Connection
    killed_at: float


class Crowd:
    """Rounds of commands at once; the invariants are checked after each command, and once more when all have ended."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._random = settings, random.Random(7)
        self._store = ModelStore(connect(settings), settings, "m")
        self._seen: list[str] = []
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(_PRELOAD)

    def run(self, *, rounds: int, at_once: int) -> Counter[str]:
        """How many commands ended how."""
        ends: Counter[str] = Counter()
        for _ in range(rounds):
            ends.update(self._round([self._start() for _ in range(at_once)]))
            state = assert_settled(self._store)
            assert state.champion == (state.last.champion if state.last else None)
            assert not [entry.found for entry in state.entries if entry.found], "nobody moved an alias by hand"
        return ends

    def _start(self) -> _Person:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_command, args=(self._settings, self._random.random(), theirs))
        process.start()
        theirs.close()
        life = self._random.uniform(0, _LONGEST_LIFE_S) if self._random.random() < _AT_ANY_TIME else float("inf")
        return _Person(process, ours, time.monotonic() + life)

    def _round(self, people: list[_Person]) -> Iterator[str]:
        while people:
            for person in people:
                if time.monotonic() > person.killed_at:
                    person.process.kill()
            wait([person.process.sentinel for person in people], timeout=0.01)
            for person in [person for person in people if person.process.exitcode is not None]:
                people.remove(person)
                yield self._checked(person)

    def _checked(self, person: _Person) -> str:
        """No reader ever finds a champion that may not be one; the journal only grows; each command was told right."""
        if (code := person.process.exitcode) == 0:
            end, token = person.answer.recv()
        else:
            end, token = "killed" if code == -signal.SIGKILL else f"exit code {code}", None
        state = self._store.read()
        assert state.champion in (None, "1", "2", "3")
        tokens = [entry.token for entry in state.entries]
        assert tokens[: len(self._seen)] == self._seen
        assert token in (*tokens, None) or end != "done"
        assert token not in tokens or end != "lost"
        self._seen = tokens
        return end


def _command(settings: Settings, seed: float, answer: Connection) -> None:
    """One command in a process of its own; sends how it ended, and the token of its entry in the journal."""
    chance = random.Random(seed)
    dies_at = chance.randrange(16) if chance.random() < _AT_A_CALL else None
    client = MortalClient(connect(settings), dies_at=dies_at, die=_kill_me, loses=0.03, seed=chance.randrange(1 << 30))
    promotion.connect = lambda settings: client  # type: ignore[assignment,return-value]
    try:
        rollback(settings, "m") if chance.random() < 0.2 else promote(settings, "m", chance.choice("123"))
        end = "done"
    except RegistryError as error:
        end = "lost" if "at the same time" in str(error) else "refused"
    except TrackingError as error:
        end = "failed" if "the connection broke before the answer came" in str(error) else str(error)
    answer.send((end, client.token))


def _kill_me(method: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
