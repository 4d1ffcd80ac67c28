"""Make the pictures of the comparison: same prompts, same seeds, teacher and student timed in one run.

Rows are ``unguided`` (teacher at s = 1), ``teacher`` (its guidance) and ``student``. Batches of the rows alternate,
so that a machine that slows down slows all alike; seconds include text encoding and decoding.
"""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image

from teefusion.claims import work_through
from teefusion.errors import IntegrityError, PromptError
from teefusion.files import json_bytes, read_json, write_bytes
from teefusion.pictures import png_bytes
from teefusion.progress import Progress
from teefusion.prompts import Prompt
from teefusion.sampling import sample
from teefusion.scoring import Scorer
from teefusion.settings import EvaluateSettings, Settings
from teefusion.storage import FolderStore
from teefusion.strategies import TEACHER, make_strategy
from teefusion.teachers import Teacher

_WARM_UP_PICTURES = 8
ROWS = ("unguided", "teacher", "student")
_Record = dict[str, dict[str, Any]]  # by row, what ``_score_batch`` measured
Draw = Callable[[list[str], float, list[torch.Generator]], list[Image]]
"""Pictures of prompts at a guidance scale, one generator of noise each."""


@dataclass
class Sampler:
    """One row of the comparison: draws at one guidance scale, and counts transformer forwards and seconds."""

    draw: Draw
    transformers: Sequence[torch.nn.Module]
    guidance_scale: float
    seed: int
    seconds: list[float] = field(default_factory=list)
    pictures: int = 0
    forwards: int = 0

    def __call__(self, prompts: Sequence[Prompt]) -> list[Image]:
        """One picture a prompt; the noise depends on seed and prompt alone."""
        generators = [torch.Generator().manual_seed(_noise_seed(self.seed, prompt)) for prompt in prompts]
        hooks = [transformer.register_forward_hook(self._count) for transformer in self.transformers]
        _synchronize()
        started = time.perf_counter()
        try:
            images = self.draw([prompt.text for prompt in prompts], self.guidance_scale, generators)
        finally:
            for hook in hooks:
                hook.remove()
        _synchronize()
        self.seconds.append((time.perf_counter() - started) / len(prompts))
        self.pictures += len(prompts)
        return images

    def warm_up(self, prompts: Sequence[Prompt]) -> None:
        """A call that is not counted: the first one pays for allocation and kernels' selection."""
        self(prompts)
        self.start_counting()

    def start_counting(self) -> None:
        """Forget what was counted."""
        self.seconds.clear()
        self.pictures = self.forwards = 0

    def count(self, pictures: int, seconds: float, forwards: int) -> None:
        """Count a batch, whoever drew it; ``seconds`` a picture."""
        self.seconds.append(seconds)
        self.pictures += pictures
        self.forwards += forwards

    @property
    def nfe(self) -> float:
        """Transformer forwards a picture; two branches in one batch count two."""
        return self.forwards / self.pictures

    def timing(self) -> dict[str, float]:
        """Median, least and greatest seconds a picture over the batches."""
        return {"median": statistics.median(self.seconds), "min": min(self.seconds), "max": max(self.seconds)}

    def _count(self, module: Any, arguments: Any, output: tuple[torch.Tensor]) -> None:
        self.forwards += output[0].shape[0]


def samplers(settings: Settings, teacher: Teacher, student: Any) -> dict[str, Sampler]:
    """The three rows of the comparison: the plain teacher, the teacher by its strategy, the student."""
    options, num_steps = settings.evaluate, settings.evaluate.num_steps or settings.strategy.num_steps
    strategy = make_strategy(settings.strategy)
    shared = {
        "height": settings.teacher.height,
        "width": settings.teacher.width,
        "max_sequence_length": settings.teacher.max_sequence_length,
    }

    def by_stock_pipeline(prompts: list[str], s: float, generators: list[torch.Generator]) -> list[Image]:
        teacher.transformer_on(TEACHER)  # switches a strategy's LoRA off
        guidance = teacher.family.guidance_options(s, len(prompts))
        result = teacher.pipeline(prompts, generator=generators, num_inference_steps=num_steps, **guidance, **shared)
        return result.images  # type: ignore[no-any-return]

    def by_strategy(prompts: list[str], s: float, generators: list[torch.Generator]) -> list[Image]:
        images: list[Image] = sample(
            teacher, strategy, prompts, guidance_scale=s, num_steps=num_steps, generators=generators
        )
        return images

    def by_student(prompts: list[str], s: float, generators: list[torch.Generator]) -> list[Image]:
        steps = settings.student.num_steps or num_steps
        result = student(prompts, guidance_scale=s, generator=generators, num_inference_steps=steps, **shared)
        return result.images  # type: ignore[no-any-return]

    plain = settings.strategy.name == "euler_cfg"
    teachers = [model for model in (teacher.pipeline.transformer, teacher.second) if model is not None]
    draw = by_stock_pipeline if plain else by_strategy
    return {
        "unguided": Sampler(by_stock_pipeline, teachers, 1.0, options.seed),
        "teacher": Sampler(draw, teachers, options.guidance_scale, options.seed),
        "student": Sampler(by_student, [student.transformer], options.guidance_scale, options.seed),
    }


def choose_prompts(heldout: Sequence[Prompt], options: EvaluateSettings) -> list[Prompt]:
    """The first ``prompts_per_style`` of each style in hash order. Raises PromptError when there are none."""
    chosen: list[Prompt] = []
    for style in sorted({prompt.style for prompt in heldout}):
        chosen += [prompt for prompt in heldout if prompt.style == style][: options.prompts_per_style]
    if not chosen:
        raise PromptError("No held-out prompt to evaluate on. Add prompts, or raise prompts.heldout_fraction.")
    return chosen


def score_rows(
    rows: dict[str, Sampler],
    scorer: Scorer,
    prompts: Sequence[Prompt],
    options: EvaluateSettings,
    folder: Path,
    *,
    records: Path | None = None,
) -> dict[str, list[float]]:
    """Scores a prompt for each row; every picture is kept as ``folder/pictures/<row>/<style>/<index>.png``.

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
            sampler.count(len(record[row]["scores"]), record[row]["seconds"], record[row]["forwards"])
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
            row: _score_batch(sampler, self._scorer, batch, self._folder / "pictures" / row, start)
            for row, sampler in self._rows.items()
        }


def _score_batch(
    sampler: Sampler, scorer: Scorer, batch: Sequence[Prompt], folder: Path, position: int
) -> dict[str, Any]:
    """Draw, score and keep a batch of one row; what was measured, JSON-ready."""
    before = sampler.forwards
    images = sampler(batch)
    scores = scorer.score(images, [prompt.text for prompt in batch])
    for k, (prompt, image) in enumerate(zip(batch, images, strict=True), start=position):
        write_bytes(folder / prompt.style / f"{k:05d}.png", png_bytes(image))
    return {"scores": scores, "seconds": sampler.seconds[-1], "forwards": sampler.forwards - before}


def _read_record(store: FolderStore, name: str, rows: Iterable[str], batch: Sequence[Prompt]) -> _Record:
    record = read_json(store.folder / name)
    if record["prompts"] != [prompt.digest for prompt in batch] or set(record["rows"]) != set(rows):
        raise IntegrityError(
            f"{store.where(name)} was scored on other prompts or rows than this evaluation's. Delete its folder and "
            "evaluate again."
        )
    made: _Record = record["rows"]
    return made


def guidance_sweep(
    rows: dict[str, Sampler], prompts: Sequence[Prompt], scales: Sequence[float]
) -> dict[str, dict[float, list[bytes]]]:
    """PNG pictures of the rows over guidance scales, one a prompt: ``[row][scale][prompt]``. None is timed."""
    sweep: dict[str, dict[float, list[bytes]]] = {}
    for row, base in rows.items():
        sweep[row] = {
            scale: [png_bytes(image) for image in replace(base, guidance_scale=scale, seconds=[])(prompts)]
            for scale in scales
        }
    return sweep


def _batches(prompts: Sequence[Prompt], size: int) -> Iterator[tuple[int, Sequence[Prompt]]]:
    """Batches, each with the position of its first prompt."""
    for start in range(0, len(prompts), size):
        yield start, prompts[start : start + size]


def _noise_seed(seed: int, prompt: Prompt) -> int:
    digest = hashlib.sha256(f"{seed}/{prompt.digest}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1  # torch seeds are signed


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
