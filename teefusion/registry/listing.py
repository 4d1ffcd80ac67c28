"""What the registry holds, for a person: versions, one version's lineage, who was champion when."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from teefusion.lineage import LINEAGE
from teefusion.registry.journal import JOURNAL_TAG, Entry
from teefusion.registry.store import ModelStore, State, require_version
from teefusion.registry.versions import DIGEST_TAG, GATE_TAG, Version
from teefusion.settings import Settings
from teefusion.tracking import connect, mlflow_errors

_LINEAGE_TAGS = (
    *("run_key", "teacher", "teacher_revision", "strategy", "prompts_sha256", *LINEAGE),
    *("student_key", DIGEST_TAG, "scorer", "scorer_sha256"),
)


def list_versions(settings: Settings, name: str | None = None) -> list[dict[str, Any]]:
    """All versions of a model, or of all models, newest first. Raises RegistryError for a model that is not there."""
    client = connect(settings)
    with mlflow_errors(settings, "list models"):
        models = client.search_registered_models(max_results=1000)
    names = [name] if name else [model.name for model in models if JOURNAL_TAG not in model.tags]
    states = [ModelStore(client, settings, name).read() for name in names]
    return [_row(version, state) for state in states for version in reversed(list(state.versions.values()))]


def describe_version(settings: Settings, name: str, number: str) -> dict[str, Any]:
    """One version with where it came from, and its model card. Raises RegistryError."""
    state = ModelStore(connect(settings), settings, name).read()
    version = require_version(state, name, number)
    lineage = {"run_id": version.run_id or None} | {tag: version.tags.get(tag) for tag in _LINEAGE_TAGS}
    return _row(version, state) | {"source": version.source, "lineage": lineage, "card": version.description}


def history(settings: Settings, name: str) -> dict[str, Any]:
    """Who was champion when, oldest first, and what is to be said of the aliases now. Raises RegistryError."""
    state = ModelStore(connect(settings), settings, name).read()
    moves = [_move(entry, until) for entry, until in zip(state.entries, (*state.entries[1:], None), strict=False)]
    return {"name": name, "champion": state.champion, "moves": moves, "note": _note(state, name)}


def _move(entry: Entry, following: Entry | None) -> dict[str, Any]:
    return {
        "champion": entry.champion,
        "since": _time(entry.at_ms),
        "until": _time(following.at_ms) if following else None,
        "action": entry.action,
        "by": entry.by,
        "override": entry.reason or None,
        "found": entry.found or None,
    }


def _note(state: State, name: str) -> str | None:
    if state.marked and state.misplaced():
        return "A move is under way, or was cut off: the next promote or rollback completes it."
    if not state.moved_by_hand:
        return None
    version = state.versions.get(state.champion or "")
    if version is None:
        return f"The alias champion was taken away by hand. Put it back: teefusion rollback {name}."
    if objection := version.objection():
        return f"The alias was moved by hand to version {version.number}, which is refused: {objection}."
    return f"The alias was moved by hand to version {version.number}."


def _row(version: Version, state: State) -> dict[str, Any]:
    tags, prefix = version.tags, "score_student_"
    return {
        "name": version.name,
        "version": version.number,
        "aliases": sorted(alias for alias, number in state.aliases.items() if number == version.number),
        "teacher": tags.get("teacher"),
        "strategy": tags.get("strategy"),
        "score": tags.get("score_student_overall"),
        "teacher_score": tags.get("score_teacher_overall"),
        "scores": {tag.removeprefix(prefix): score for tag, score in tags.items() if tag.startswith(prefix)},
        "gate": tags.get(GATE_TAG, "did not run"),
        "override": version.override and version.override.get("reason"),
        "created": _time(version.created_ms),
    }


def versions_text(rows: Sequence[dict[str, Any]]) -> str:
    """The table of ``teefusion models``."""
    header = ("model", "version", "aliases", "teacher", "strategy", "score", "teacher's", "gate", "age")
    lines = [
        (
            *(row["name"], row["version"], ", ".join(row["aliases"]) or "-", row["teacher"] or "-"),
            *(row["strategy"] or "-", _short(row["score"]), _short(row["teacher_score"])),
            row["gate"] + (" (overridden)" if row["override"] else ""),
            _age(row["created"]),
        )
        for row in rows
    ]
    return _table(header, lines) if lines else "No model is registered here yet: 'teefusion run' ends with one."


def version_text(row: dict[str, Any]) -> str:
    """One version, its lineage and card."""
    facts = {
        "version": f"{row['name']} version {row['version']} ({', '.join(row['aliases']) or 'no alias'})",
        "gate": row["gate"] + (f", overridden: {row['override']}" if row["override"] else ""),
        "source": row["source"],
        **row["lineage"],
    }
    width = max(map(len, facts))
    card = str(row["card"])
    return "\n".join([*(f"{name:<{width}}  {value or 'unknown'}" for name, value in facts.items()), "", card])


def history_text(result: dict[str, Any]) -> str:
    """The table of ``teefusion history``."""
    header = ("champion", "since", "until", "by", "how")
    lines = [(f"version {m['champion']}", m["since"], m["until"] or "now", m["by"], _how(m)) for m in result["moves"]]
    table = _table(header, lines) if lines else f"No version of {result['name']} was promoted yet."
    return "\n".join([table, *([result["note"]] if result["note"] else [])])


def _how(move: dict[str, Any]) -> str:
    override = f", overriding the gate: {move['override']}" if move["override"] else ""
    found = f", in place of version {move['found']}, made champion by hand" if move["found"] else ""
    return f"{move['action']}{override}{found}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[k]) for line in (header, *lines)) for k in range(len(header))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (header, *lines)]
    return "\n".join(row.rstrip() for row in rows)


def _short(score: str | None) -> str:
    return "-" if score is None else f"{float(score):.2f}"


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _age(created: str) -> str:
    """In the largest unit that makes at least two of it."""
    then = datetime.strptime(created, "%Y-%m-%d %H:%M:%S UTC").replace(tzinfo=UTC)
    seconds = max(0, int((datetime.now(UTC) - then).total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
