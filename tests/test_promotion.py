"""Promotion and rollback: what is refused, what is remembered, and that nothing is ever half done."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from teefusion.errors import RegistryError
from teefusion.registry import promotion, resolve
from teefusion.registry.journal import Entry, counted
from teefusion.registry.promotion import promote, rollback
from teefusion.registry.store import ModelStore, State
from teefusion.settings import Settings, load_settings
from teefusion.tracking import connect
from tests import postgres
from tests.crowd import Crowd, assert_settled
from tests.registered import Killed, MortalClient, add_version

Use = Callable[[Any], None]


GATES = ("passed", "passed", "passed", "failed")


@pytest.fixture
def settings(tmp_path: Path, empty_registry: Path) -> Settings:
    """Of a registry with versions 1 to 4 of model m; the gate of 4 did not pass."""
    settings = load_settings(overrides={"workdir": empty_registry})
    client = connect(settings)
    for gate in GATES:
        add_version(client, tmp_path, gate=gate)
    return settings


def store_of(settings: Settings) -> ModelStore:
    return ModelStore(connect(settings), settings, "m")


def state_of(settings: Settings) -> State:
    return store_of(settings).read()


def aliases(settings: Settings) -> dict[str, str]:
    return dict(state_of(settings).aliases)


def test_rollbacks_go_back_one_champion_after_the_other(settings: Settings) -> None:
    for number in ("1", "2", "3"):
        promote(settings, "m", number)
    assert aliases(settings) == {"champion": "3", "previous": "2"}
    assert (rollback(settings, "m").champion, aliases(settings)) == ("2", {"champion": "2", "previous": "1"})
    assert (rollback(settings, "m").champion, aliases(settings)) == ("1", {"champion": "1"})
    with pytest.raises(RegistryError, match="nothing to roll m back to: no version was champion before version 1"):
        rollback(settings, "m")
    assert [(e.action, e.champion) for e in state_of(settings).entries] == [
        *(("promote", number) for number in ("1", "2", "3")),
        *(("rollback", number) for number in ("2", "1")),
    ]


def test_promoting_the_champion_changes_nothing(settings: Settings) -> None:
    promote(settings, "m", "1")
    assert promote(settings, "m", "1").changed is False
    assert len(state_of(settings).entries) == 1


def test_a_version_whose_gate_failed_takes_an_override_that_is_recorded(settings: Settings) -> None:
    with pytest.raises(RegistryError, match=r"m version 4 cannot become champion: its gate did not pass \(failed\)"):
        promote(settings, "m", "4")
    assert aliases(settings) == {}
    promote(settings, "m", "4", override="for the demo")
    state = state_of(settings)
    assert state.last is not None
    assert state.last.reason == "for the demo"
    override = state.versions["4"].override
    assert override is not None
    assert override["reason"] == "for the demo"
    assert resolve("models:/m@champion", settings).version == "4"


def test_changed_files_are_promoted_by_an_override_alone_and_as_they_are(settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "student-1" / "model_index.json").write_text("{}")
    with pytest.raises(RegistryError, match="m version 1 is not what was registered"):
        promote(settings, "m", "1")
    promote(settings, "m", "1", override="retouched")
    assert resolve("models:/m@champion", settings).version == "1"
    (tmp_path / "student-1" / "model_index.json").write_text("[]")
    with pytest.raises(RegistryError, match="m version 1 is not what was registered"):
        resolve("models:/m@champion", settings)


def test_a_champion_made_by_hand_becomes_previous_where_its_gate_passed(settings: Settings) -> None:
    promote(settings, "m", "1")
    connect(settings).set_registered_model_alias("m", "champion", "2")
    promote(settings, "m", "3")
    assert aliases(settings) == {"champion": "3", "previous": "2"}
    last = state_of(settings).last
    assert last is not None
    assert (last.found, last.line) == ("2", ("3", "2", "1"))


@pytest.mark.parametrize("command", [lambda s: rollback(s, "m"), lambda s: promote(s, "m", "1")])
def test_a_bad_alias_made_by_hand_is_put_right_by_rollback_and_by_promote(
    settings: Settings, command: Callable[[Settings], Any]
) -> None:
    promote(settings, "m", "2")
    promote(settings, "m", "1")
    connect(settings).set_registered_model_alias("m", "champion", "4")
    with pytest.raises(RegistryError, match="points to version 4, which may not be used"):
        resolve("models:/m@champion", settings)
    command(settings)
    assert resolve("models:/m@champion", settings).version == "1"
    assert "4" not in state_of(settings).line


def test_a_version_that_was_deleted_is_passed_over(settings: Settings) -> None:
    for number in ("1", "2", "3"):
        promote(settings, "m", number)
    connect(settings).delete_model_version("m", "2")
    rollback(settings, "m")
    assert aliases(settings) == {"champion": "1"}


def test_of_two_at_once_one_wins_and_the_other_is_told_by_whom(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(settings, "m", "1")
    monkeypatch.setattr(promotion, "_who", lambda: "ann")
    check = promotion._check

    def check_while_ann_promotes(settings: Settings, version: Any) -> str:
        monkeypatch.setattr(promotion, "_check", check)
        promote(settings, "m", "3")
        return check(settings, version)

    monkeypatch.setattr(promotion, "_check", check_while_ann_promotes)
    with pytest.raises(RegistryError, match="ann moved the champion of m to version 3 at the same time, so your"):
        promote(settings, "m", "2")
    assert aliases(settings) == {"champion": "3", "previous": "1"}


def test_what_counts_in_the_journal_is_decided_by_the_order_alone() -> None:
    def entry(number: int, after: int) -> Entry:
        return Entry("promote", (str(number),), after, "ann", f"token-{number}", number=number)

    written = [entry(1, 0), entry(2, 0), entry(3, 1), entry(4, 1), entry(5, 2), entry(6, 3)]
    assert [found.number for found in counted(reversed(written))] == [1, 3, 6]


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Use:
    """Has the commands of the calling thread use this client."""
    real, chosen = promotion.connect, threading.local()
    monkeypatch.setattr(promotion, "connect", lambda s: getattr(chosen, "client", None) or real(s))
    return lambda client: setattr(chosen, "client", client)


@pytest.mark.parametrize(
    ("command", "back", "after"),
    [
        (lambda s: promote(s, "m", "3"), lambda s: rollback(s, "m"), ("3", "2", "1")),
        pytest.param(
            lambda s: promote(s, "m", "4", override="demo"),
            lambda s: rollback(s, "m"),
            ("4", "2", "1"),
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda s: rollback(s, "m"), lambda s: promote(s, "m", "2"), ("1",), marks=pytest.mark.slow),
    ],
    ids=["promote", "override", "rollback"],
)
def test_killed_between_any_two_calls_it_is_done_or_undone_by_the_next_command(
    settings: Settings,
    use: Use,
    command: Callable[[Settings], Any],
    back: Callable[[Settings], Any],
    after: tuple[str, ...],
) -> None:
    before = ("2", "1")
    promote(settings, "m", "1")
    promote(settings, "m", "2")
    mortal, ends = MortalClient(connect(settings)), set()
    for dies_at in range(100):
        mortal.dies_at, mortal.calls = dies_at, []
        use(mortal)
        try:
            command(settings)
            break
        except Killed:
            use(None)
        assert state_of(settings).champion in (before[0], after[0])
        line = assert_settled(store_of(settings)).line
        ends.add(line)
        if line == after:
            back(settings)
    assert ends == {before, after}
    assert "set_registered_model_alias" in mortal.calls


@pytest.mark.parametrize("killed", [False, True], ids=["lives", "is killed then"])
def test_an_alias_written_after_another_promotion_does_not_stay(settings: Settings, use: Use, killed: bool) -> None:
    promote(settings, "m", "1")
    late, overtaken = MortalClient(connect(settings)), threading.Event()

    def overtake(method: str) -> None:
        if method == "set_registered_model_alias" and not overtaken.is_set():
            overtaken.set()
            use(None)
            promote(settings, "m", "3")
            use(late)
        elif method.startswith(("search", "get")) and overtaken.is_set():
            assert aliases(settings) == {"champion": "2", "previous": "1"}, "nothing was written too late"
            late.before = lambda method: None
            if killed:
                raise Killed(method)

    late.before = overtake
    use(late)
    with pytest.raises(Killed) if killed else contextlib.nullcontext():
        promote(settings, "m", "2")
    use(None)
    assert assert_settled(store_of(settings)).line == ("3", "2", "1")
    assert aliases(settings) == {"champion": "3", "previous": "2"}


def test_an_alias_that_another_inserts_at_the_same_moment_is_updated(settings: Settings, use: Use) -> None:
    """As PostgreSQL has it: both saw no alias, and the second row of the same name is refused."""
    late = MortalClient(connect(settings))
    refused = ["champion"]

    def overtake(method: str) -> None:
        if method == "set_registered_model_alias" and refused:
            refused.clear()
            raise MlflowException("(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint")

    late.before = overtake
    use(late)
    promote(settings, "m", "1")
    assert aliases(settings) == {"champion": "1"}


def test_who_is_overtaken_and_hears_nothing_has_lost(settings: Settings, use: Use) -> None:
    late, overtaken = MortalClient(connect(settings)), threading.Event()

    def overtake(method: str) -> None:
        if method == "create_model_version" and not overtaken.is_set():
            overtaken.set()
            use(None)
            promote(settings, "m", "3")
            use(late)
            raise MlflowException("(psycopg2.errors.UniqueViolation) duplicate key value violates unique constraint")

    late.before = overtake
    use(late)
    with pytest.raises(RegistryError, match="moved the champion of m to version 3 at the same time"):
        promote(settings, "m", "2")
    assert aliases(settings) == {"champion": "3"}


@pytest.mark.slow
@pytest.mark.skipif(postgres.missing() is not None, reason=str(postgres.missing()))
def test_two_hundred_promotions_at_once_with_processes_killed_and_lost_answers(tmp_path: Path) -> None:
    with postgres.postgres_server() as server:
        url = postgres.database(server, "registry")
        settings = load_settings(overrides={"workdir": tmp_path, "mlflow.tracking_uri": url})
        for gate in GATES:
            add_version(connect(settings), tmp_path, gate=gate)
        ends = Crowd(settings).run(rounds=25, at_once=8)
    assert sum(ends.values()) == 200
    assert ends.keys() <= {"done", "lost", "killed", "failed", "refused"}
    assert min(ends[end] for end in ("done", "lost", "killed")) > 0, ends
