"""Make the pictures of the comparison: same prompts, same seeds, all rows timed in one run.

Batches of the rows alternate, so that a machine that slows down slows all alike.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from teefusion.claims import work_through
from teefusion.errors import IntegrityError, PromptError
from teefusion.files import json_bytes, plain_name, read_json, write_bytes
from teefusion.pictures import png_bytes
from teefusion.progress import Progress
from teefusion.prompts import Prompt
from teefusion.samplers import Sampler
from teefusion.scoring import Scorer
from teefusion.settings import EvaluateSettings
from teefusion.storage import FolderStore

_WARM_UP_PICTURES = 8
Item = TypeVar("Item")
_Record = dict[str, dict[str, Any]]  # by row, what ``_score_batch`` measured


def choose_prompts(heldout: Sequence[Prompt], options: EvaluateSettings) -> list[Prompt]:
    """The first ``prompts_per_style`` of each style in hash order. Raises PromptError when there are none."""
    chosen: list[Prompt] = []
    for style in sorted({prompt.style for prompt in heldout}):
        chosen += [prompt for prompt in heldout if prompt.style == style][: options.prompts_per_style]
    if not chosen:
        raise PromptError("No held-out prompt to evaluate on. Add prompts, or raise prompts.heldout_fraction.")
    return chosen


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """So many of the items at most, evenly over all of them: of prompts style by style, from every style."""
    chosen = min(count, len(items))
    return [items[k * len(items) // chosen] for k in range(chosen)]


def picture_path(folder: Path, row: str, prompt: Prompt, position: int) -> Path:
    """Where ``score_rows`` keeps a row's picture of the prompt at that position."""
    return folder / "pictures" / row / plain_name(prompt.style) / f"{position:05d}.png"


def score_rows(
    rows: dict[str, Sampler],
    scorer: Scorer,
    prompts: Sequence[Prompt],
    options: EvaluateSettings,
    folder: Path,
    *,
    records: Path | None = None,
) -> dict[str, list[float]]:
    """Scores a prompt for each row; every picture is kept (``picture_path``).

    Pictures are scored as they are made, a batch of each row at a time; forwards and seconds are then those of every
    batch. With ``records``, a folder that belongs to this very comparison, each batch is recorded there, one that is
    recorded is not made again, and any number of processes share them out. Raises ScorerError, StorageError, and
    IntegrityError for a record of another comparison.
    """
    batches = {f"{start:05d}.json": (start, batch) for start, batch in _batches(prompts, options.batch_size)}
    store = FolderStore(records) if records else None
    maker = _Maker(rows, scorer, folder, prompts[: min(options.batch_size, _WARM_UP_PICTURES)])

    def find(name: str) -> _Record | None:
        return None if store is None or store.size(name) is None else _read_record(store, name, rows, batches[name][1])

    def make(name: str) -> _Record:
        start, batch = batches[name]
        record = maker.make(batch, start)
        if store is not None:  # after the pictures: a record says that they are there
            store.write(name, json_bytes({"prompts": [prompt.digest for prompt in batch], "rows": record}))
        return record

    total, first = len(prompts) * len(rows), os.environ.get("RANK", "0") == "0"
    with Progress("evaluate", total=total, unit="picture", enabled=first) as progress:

        def found(record: _Record, made: bool) -> None:
            progress.advance(sum(len(row["scores"]) for row in record.values()))

        done = _work(store, list(batches), find, make, found)
    for row, sampler in rows.items():
        sampler.start_counting()
        for record in done.values():
            batch = record[row]
            sampler.count(len(batch["scores"]), batch["seconds"], batch["forwards"], batch["peak_bytes"])
    return {row: [score for record in done.values() for score in record[row]["scores"]] for row in rows}


def _work(
    store: FolderStore | None,
    names: Sequence[str],
    find: Callable[[str], _Record | None],
    make: Callable[[str], _Record],
    found: Callable[[_Record, bool], None],
) -> dict[str, _Record]:
    """Every batch's record, in order; without a store made here, one after the other."""
    if store is not None:
        return work_through(store, names, find, make, found=found)
    done = {}
    for name in names:
        done[name] = make(name)
        found(done[name], True)
    return done


class _Maker:
    """Makes batches, after a first one that is not counted."""

    def __init__(self, rows: Mapping[str, Sampler], scorer: Scorer, folder: Path, first: Sequence[Prompt]) -> None:
        self._rows, self._scorer, self._folder, self._first = rows, scorer, folder, first
        self._warm = False

    def make(self, batch: Sequence[Prompt], start: int) -> _Record:
        """Draw, score and keep a batch of every row."""
        if not self._warm:
            for sampler in self._rows.values():
                sampler.warm_up(self._first)
            self._warm = True
        return {
            row: _score_batch(sampler, self._scorer, batch, self._folder, row, start)
            for row, sampler in self._rows.items()
        }


def _score_batch(
    sampler: Sampler, scorer: Scorer, batch: Sequence[Prompt], folder: Path, row: str, position: int
) -> dict[str, Any]:
    """Draw, score and keep a batch of one row; what was measured, JSON-ready."""
    before = sampler.forwards
    images = sampler(batch)
    scores = scorer.score(images, [prompt.text for prompt in batch])
    for k, (prompt, image) in enumerate(zip(batch, images, strict=True), start=position):
        write_bytes(picture_path(folder, row, prompt, k), png_bytes(image))
    return {
        "scores": scores,
        "seconds": sampler.seconds[-1],
        "forwards": sampler.forwards - before,
        "peak_bytes": sampler.peak_bytes,
    }


def _read_record(store: FolderStore, name: str, rows: Iterable[str], batch: Sequence[Prompt]) -> _Record:
    record = read_json(store.folder / name)
    if record["prompts"] != [prompt.digest for prompt in batch] or set(record["rows"]) != set(rows):
        raise IntegrityError(
            f"{store.where(name)} was scored on other prompts or rows than this evaluation's. Delete its folder and "
            "evaluate again."
        )
    made: _Record = record["rows"]
    return made


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[tuple[int, Sequence[Prompt]]]:
    """Batches, each with the position of its first prompt."""
    for start in range(0, len(prompts), size):
        yield start, prompts[start : start + size]
