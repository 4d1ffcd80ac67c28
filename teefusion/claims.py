"""Share work out among any number of workers that know nothing of each other, through one store.

Every item is an object that is published whole. A worker takes an item by creating a claim, which only one can; claims
say who goes first, not who owns: they have no owner to ask, no clock and no end. When nothing is left to take, a worker
waits about as long as an item takes, and then takes what is still not published a second time, and so on. So a worker
that dies costs its unfinished item, one that comes late takes part at once, and none is waited for. How long an item
takes is known to a worker that has made one, and from the word that one left to those that have not.

    claims/<item>.<attempt>     in the store, until the work is done
    claims/longest              seconds that an item took
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from typing import TypeVar

from teefusion.errors import NotFoundError
from teefusion.storage import Store

log = logging.getLogger(__name__)
CLAIMS = "claims/"
_LONGEST = f"{CLAIMS}longest"
_PATIENCE = 2.0  # of the longest item so far, before another's is taken too
_UNKNOWN_S = 5.0  # taken for an item's time where nobody has made one yet
_POLL_S = 1.0

Done = TypeVar("Done")


def work_through(
    store: Store,
    items: Sequence[str],
    find: Callable[[str], Done | None],
    make: Callable[[str], Done],
    *,
    find_all: Callable[[Sequence[str]], dict[str, Done]] | None = None,
    found: Callable[[Done, bool], None] = lambda _done, _made: None,
) -> dict[str, Done]:
    """Make what is missing of the items, together with other workers, and return all of them once all are published.

    ``find`` gives a published item or none, ``find_all`` those of many that are published, ``make`` makes and publishes
    one, ``found`` hears of each and of whether this worker made it. Raises what they raise; then the item is free for
    others after their patience.
    """
    worker = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex}"
    done: dict[str, Done] = {}
    attempt, longest_s = 0, 0.0
    missing = _rotated(items)
    while missing:
        published = find_all(missing) if find_all else _each(missing, find)
        for name in missing:
            item, made = published.get(name), False
            if item is None:
                granted = store.create(f"{CLAIMS}{name}.{attempt}", worker.encode())
                item = find(name)  # published since
                if item is None and granted:
                    started = time.monotonic()
                    item, made = make(name), True
                    if (took_s := time.monotonic() - started) > longest_s:
                        longest_s = took_s
                        store.write(_LONGEST, json.dumps(took_s).encode())
            if item is not None:
                done[name] = item
                found(item, made)
        missing = [name for name in missing if name not in done]
        if missing:
            _wait_for_others(missing, find, _PATIENCE * (longest_s or _told_longest_s(store)))
            attempt += 1
    return {name: done[name] for name in items}


def forget_claims(store: Store) -> None:
    """Remove the claims of finished work."""
    for name in store.sizes(CLAIMS):
        store.delete(name)


def _each(names: Sequence[str], find: Callable[[str], Done | None]) -> dict[str, Done]:
    return {name: item for name in names if (item := find(name)) is not None}


def _rotated(items: Sequence[str]) -> list[str]:
    """The items, from another one on for every rank of torchrun, so that ranks seldom want the same."""
    first = len(items) * int(os.environ.get("RANK", "0")) // max(int(os.environ.get("WORLD_SIZE", "1")), 1)
    return [*items[first:], *items[:first]]


def _told_longest_s(store: Store) -> float:
    """What another worker says, for one that has made nothing itself."""
    try:
        return float(json.loads(store.read(_LONGEST)))
    except NotFoundError:
        return _UNKNOWN_S


def _wait_for_others(missing: Sequence[str], find: Callable[[str], object], patience_s: float) -> None:
    """Return when none of the items is missing any more, or after ``patience_s``."""
    if patience_s > _POLL_S:
        log.info("waiting up to %.0f s for %d shards that other workers have claimed", patience_s, len(missing))
    end = time.monotonic() + patience_s
    left = list(missing)
    while time.monotonic() < end:
        left = [name for name in left if find(name) is None]
        if not left:
            return
        time.sleep(min(_POLL_S, patience_s / 10))
    if patience_s:
        log.info("%d shards claimed by other workers are still not published: taking them too", len(left))
