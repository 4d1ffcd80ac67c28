"""The journal of a model's promotions, in MLflow: what happened in which order, on which all who read it agree.

MLflow moves an alias without asking where it was, so two that move it at once both succeed. What it does atomically is
to make a version with the next number and all its tags. So each move is first a version of a second registered model,
``NAME.promotions``: an entry. It says after which entry it was written, and counts only if that one is still the last
that counts. Of several written after the same entry, the lowest number counts and the others never will.

Whoever is about to write aliases leaves a mark on the entry that they follow, and takes it away after having seen the
aliases where the journal wants them. So while there is no mark no write is under way, and none was cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

JOURNAL_TAG = "teefusion.journal"
"""On the registered model that holds the entries, so that listings leave it out."""
MARK = "moving."
"""Begins the tags that are marks; a command's token follows. The value is the time (s)."""
Action = Literal["promote", "rollback"]


@dataclass(frozen=True)
class Entry:
    """One move of the champion. ``number`` and ``at_ms`` are the server's."""

    action: str
    line: tuple[str, ...]
    """The champion, and below it the versions that rollbacks return to, one after the other."""
    after: int
    """Number of the last entry that counted when this one was written; 0 for the first."""
    by: str
    token: str
    """Of the command, to find its own entry where the answer to writing it was lost."""
    reason: str = ""
    """Of an override; such an entry accepts the gate's verdict and ``digest`` as they are."""
    digest: str = ""
    found: str = ""
    """The version that the alias named instead of the last champion, as somebody had moved it by hand."""
    number: int = 0
    at_ms: int = 0
    marks: Mapping[str, float] = field(default_factory=dict)
    """When the commands that carry it out began, by token."""

    @property
    def champion(self) -> str:
        """The version that this entry makes champion."""
        return self.line[0]

    def tags(self) -> dict[str, str]:
        """What a version of the journal carries."""
        texts = {name: getattr(self, name) for name in ("action", "by", "token", "reason", "digest", "found")}
        return {name: text for name, text in texts.items() if text} | {
            "line": ",".join(self.line),
            "after": str(self.after),
            **{f"{MARK}{token}": str(at) for token, at in self.marks.items()},
        }

    @classmethod
    def of(cls, version: Any) -> Entry:
        """From MLflow's version. Raises KeyError, ValueError for one that is no entry."""
        tags = version.tags
        texts = {name: tags.get(name, "") for name in ("by", "token", "reason", "digest", "found")}
        return cls(
            action=tags["action"],
            line=tuple(tags["line"].split(",")),
            after=int(tags["after"]),
            number=int(version.version),
            at_ms=version.creation_timestamp,
            marks={key.removeprefix(MARK): float(at) for key, at in tags.items() if key.startswith(MARK)},
            **texts,
        )


def counted(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """The entries that count, in order. Pure; the same for all readers, as an entry only ever follows visible ones."""
    chain: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: entry.number):
        if entry.after == (chain[-1].number if chain else 0):
            chain.append(entry)
    return tuple(chain)


def journal_name(model: str) -> str:
    """The registered model that holds the entries."""
    return f"{model}.promotions"
