"""Make a target set, alone or with any number of workers anywhere: agree on a plan, share out the shards, publish.

What a shard holds follows from the plan and its number alone, so who makes it does not matter, and the manifest is the
same however many took part (on one kind of machine: other hardware rounds the last bits otherwise).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import torch
from accelerate.utils import find_executable_batch_size
from pydantic import ValidationError
from torch import Tensor

from teefusion.claims import forget_claims, work_through
from teefusion.devices import local_device
from teefusion.errors import IntegrityError, TeEFusionError
from teefusion.families import TextEmbeddings
from teefusion.files import json_bytes
from teefusion.images import CaptionedPictures
from teefusion.manifests import (
    PLAN,
    SCHEMA_VERSION,
    FileRecord,
    Manifest,
    Plan,
    Split,
    SplitRecord,
    target_key,
    write_manifest,
)
from teefusion.progress import Progress
from teefusion.prompts import Prompt, PromptSet, load_prompt_set
from teefusion.settings import JOB_VARIABLE, Settings, job_settings
from teefusion.shards import all_finished, finished, read_tensors, write_tensors
from teefusion.storage import Store, open_store
from teefusion.strategies import make_strategy
from teefusion.targets import Draw, draw, noise_pictures, walk
from teefusion.teachers import Teacher, load_teacher
from teefusion.tracking import Tracker, is_main_rank
from teefusion.weights import with_weights

log = logging.getLogger("teefusion.targets")
_NULL = "embeddings/null"
Make = Callable[[str], FileRecord]
Count = Callable[[FileRecord, bool], None]


def generate_targets(
    settings: Settings, prompts: PromptSet, store: Store, *, tracker: Tracker | None = None
) -> Manifest:
    """Make what is missing of the target set, together with whoever else does, and publish its manifest.

    Raises TeacherError, StorageError, IntegrityError for a plan that is not this set's, and TrainingError for a teacher
    that gives non-finite velocities.
    """
    teacher = with_weights(load_teacher(settings.teacher, device=local_device(settings.device)), settings.strategy)
    parts = [
        _Part("train", prompts.train, settings.targets.trajectories, settings.targets.shard_trajectories),
        _Part("heldout", prompts.heldout, settings.targets.heldout_trajectories, settings.targets.shard_trajectories),
    ]
    plan = _agree(settings, prompts, store, lambda: _batch_size(settings, teacher))
    return _publish(plan, store, parts, _Worker(settings, plan, store, teacher, parts, tracker or Tracker(None, "")))


def generate_tracked(settings: Settings, prompts: PromptSet, store: Store) -> Manifest:
    """``generate_targets``, with counters to MLflow. Raises TrackingError too, before anything is spent."""
    tracker = Tracker.open(settings, enabled=is_main_rank())
    try:
        return generate_targets(settings, prompts, store, tracker=tracker)
    finally:
        tracker.close()


@dataclass(frozen=True)
class _Part:
    """One split: its trajectories in shards, and the prompts they use in blocks of as many."""

    split: Split
    prompts: Sequence[Prompt]
    trajectories: int
    block: int

    @cached_property
    def used(self) -> Sequence[Prompt]:
        return self.prompts[: min(len(self.prompts), self.trajectories)]

    @cached_property
    def embeddings(self) -> dict[str, range]:
        """Name and prompts of each block."""
        return self._cut("embeddings", len(self.used))

    @cached_property
    def states(self) -> dict[str, range]:
        """Name and trajectories of each shard."""
        return self._cut("states", self.trajectories)

    def _cut(self, kind: str, count: int) -> dict[str, range]:
        starts = range(0, count, self.block)
        return {self.name(kind, k): range(a, min(a + self.block, count)) for k, a in enumerate(starts)}

    def name(self, kind: str, k: int) -> str:
        """Of the k-th block or shard."""
        return f"{kind}/{self.split}-{k:05d}"


def _agree(settings: Settings, prompts: PromptSet, store: Store, batch_size: Callable[[], int]) -> Plan:
    """The set's plan: the first worker's, which all others adopt. Raises IntegrityError for one of another set."""

    def plan(size: int) -> Plan:
        return Plan(
            schema_version=SCHEMA_VERSION,
            key=target_key(settings, prompts.sha256),
            teacher=settings.teacher.content(),
            strategy=settings.strategy.content(),
            targets=settings.targets.content() | {"batch_size": size},
            prompt_set=prompts.sha256,
        )

    if store.size(PLAN) is None:
        store.create(PLAN, json_bytes(plan(batch_size()).model_dump(mode="json")))
    try:
        found = Plan.model_validate(json.loads(store.read(PLAN)))
        same = found == plan(int(found.targets["batch_size"]))
    except (ValueError, ValidationError, KeyError, TypeError):
        same = False
    if not same:
        raise IntegrityError(
            f"{store.where(PLAN)} is damaged, or the plan of another set than {target_key(settings, prompts.sha256)}. "
            "Delete it and run 'teefusion targets' again: finished shards are kept."
        )
    return found


def _batch_size(settings: Settings, teacher: Teacher) -> int:
    """Trajectories a batch: as set, or the most that a step has memory for, a shard at most."""
    if settings.targets.batch_size != "auto":
        return settings.targets.batch_size
    strategy, grid = make_strategy(settings.strategy), teacher.grid(settings.strategy.num_steps)
    null = teacher.encode([""])

    @find_executable_batch_size(starting_batch_size=settings.targets.shard_trajectories)  # type: ignore[untyped-decorator]
    def largest(batch_size: int) -> int:
        text = TextEmbeddings(*(part.expand(batch_size, *part.shape[1:]) for part in null))
        x = torch.zeros(batch_size, *teacher.latent_shape, device=teacher.device)
        s = torch.full([batch_size], settings.strategy.guidance_max, device=teacher.device)
        with torch.no_grad():
            strategy.step(teacher.denoiser(text, null), grid, x, 0, s)
        return batch_size

    found = int(largest())
    log.info("targets.batch_size auto: %d trajectories fit", found)
    return found


def _publish(plan: Plan, store: Store, parts: Sequence[_Part], worker: _Worker) -> Manifest:
    """Work through embeddings and then states, and publish the manifest once all are there."""
    texts = [_NULL, *(name for part in parts for name in part.embeddings)]
    with Progress("targets (text)", total=len(texts), unit="block") as progress:
        embedded = worker.work_through(texts, worker.encode, lambda _record, _made: progress.advance())
    worker.text_is_done(embedded)
    states = [name for part in parts for name in part.states]
    with Progress("targets", total=sum(part.trajectories for part in parts), unit="trajectory") as progress:
        sampled = worker.work_through(states, worker.sample, worker.counter(progress))
    train, heldout = (
        SplitRecord(
            states=tuple(sampled[name] for name in part.states),
            embeddings=tuple(embedded[name] for name in part.embeddings),
            prompts_per_block=part.block,
        )
        for part in parts
    )
    manifest = Manifest(
        **plan.model_dump(exclude={"teacher"}),
        teacher=plan.teacher | {"family": worker.teacher.family.name},
        sigmas=tuple(float(sigma) for sigma in worker.grid.sigmas),
        latent_shape=worker.teacher.latent_shape,
        forwards=sum(record.forwards for record in sampled.values()),
        null=embedded[_NULL],
        train=train,
        heldout=heldout,
    )
    manifest = write_manifest(store, manifest)
    forget_claims(store)
    return manifest


class _Worker:
    """Makes single items of the set: blocks of embeddings, shards of states."""

    def __init__(
        self,
        settings: Settings,
        plan: Plan,
        store: Store,
        teacher: Teacher,
        parts: Sequence[_Part],
        tracker: Tracker,
    ) -> None:
        self.settings, self.store, self.teacher, self.tracker = settings, store, teacher, tracker
        self._batch_size = int(plan.targets["batch_size"])
        self._parts = {part.split: part for part in parts}
        self._blocks = {name: (part, rows) for part in parts for name, rows in part.embeddings.items()}
        self._shards = {name: (part, rows) for part in parts for name, rows in part.states.items()}
        self._embedded: dict[str, FileRecord] = {}
        self.strategy = make_strategy(settings.strategy)
        self.grid = teacher.grid(settings.strategy.num_steps)
        images = settings.targets.images
        self._pictures = CaptionedPictures(Path(images)) if images else None
        if self._pictures is not None:
            for part in parts:
                self._pictures.require(part.used)

    def work_through(self, names: Sequence[str], make: Make, found: Count) -> dict[str, FileRecord]:
        """Make what is missing of the items, together with other workers; see ``claims.work_through``."""
        store = self.store
        find, find_all = partial(finished, store), partial(all_finished, store)
        return work_through(store, names, find, make, find_all=find_all, found=found)

    def encode(self, name: str) -> FileRecord:
        """Make a block of prompt embeddings."""
        prompts = [""]
        if name != _NULL:
            part, rows = self._blocks[name]
            prompts = [part.used[k].text for k in rows]
        text = self.teacher.encode(prompts)
        tensors = {"tokens": text.tokens_BTE.cpu(), "pooled": text.pooled_BP.cpu()}
        return write_tensors(self.store, name, tensors)

    def text_is_done(self, embedded: dict[str, FileRecord]) -> None:
        """From here on text comes from the store, and the device's memory is the transformer's."""
        self._embedded = embedded
        self._null = self._on_device(read_tensors(self.store, embedded[_NULL]))
        self.teacher.park_text_encoders()
        if self.settings.targets.compile:
            self.teacher.pipeline.transformer.compile()

    def sample(self, name: str) -> FileRecord:
        """Make a shard of states."""
        part, trajectories = self._shards[name]
        blocks: dict[int, dict[str, Tensor]] = {}
        batches = [trajectories[k : k + self._batch_size] for k in range(0, len(trajectories), self._batch_size)]
        rows = [self._batch(part, batch, blocks) for batch in batches]
        shard = {name: torch.cat([batch[name] for batch in rows]) for name in rows[0]}
        dtype = getattr(torch, self.settings.targets.dtype)
        shard |= {name: shard[name].to(dtype) for name in ("x", "velocity")}
        return write_tensors(self.store, name, shard, forwards=self._price(shard, len(trajectories)))

    def counter(self, progress: Progress) -> Count:
        """What hears of each shard: shows it, and logs what this worker made."""
        started, made_forwards, trajectories = time.monotonic(), 0, 0

        def count(record: FileRecord, made: bool) -> None:
            nonlocal made_forwards, trajectories
            size = len(self._shards[record.name][1])
            made_forwards += record.forwards if made else 0
            trajectories += size
            progress.advance(size, forwards=record.forwards if made else 0)
            rate = made_forwards / max(time.monotonic() - started, 1e-9)
            values = {"trajectories": trajectories, "forwards": made_forwards, "forwards_per_second": rate}
            self.tracker.log_metrics({f"targets/{name}": value for name, value in values.items()}, step=trajectories)

        return count

    def _price(self, rows: dict[str, Tensor], trajectories: int) -> int:
        """Forwards that a shard took: of whole trajectories, or of the kept steps alone."""
        if self._pictures is None:
            return trajectories * self.strategy.forwards(len(self.grid))
        return sum(map(self.strategy.forwards_at, rows["step"].tolist()))

    def _batch(self, part: _Part, batch: range, blocks: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
        """Rows of a batch of trajectories; ``blocks`` keeps the embeddings of its shard."""
        prompts, kept = part.used, self.settings.targets.states_per_trajectory
        chosen = [j % len(prompts) for j in batch]
        for b in {p // part.block for p in chosen} - blocks.keys():
            blocks[b] = read_tensors(self.store, self._embedded[part.name("embeddings", b)])
        text = self._on_device(
            {
                name: torch.stack([blocks[p // part.block][name][p % part.block] for p in chosen])
                for name in ("tokens", "pooled")
            }
        )
        draws = [
            draw(self.settings, part.split, j, prompts[p], self.teacher.latent_shape)
            for j, p in zip(batch, chosen, strict=True)
        ]
        rows = self._rows(text, draws, [prompts[p] for p in chosen])
        rows["trajectory"] = torch.tensor(batch, dtype=torch.int64).repeat_interleave(kept)
        rows["prompt"] = torch.tensor(chosen, dtype=torch.int64).repeat_interleave(kept)
        return rows

    def _rows(self, text: TextEmbeddings, draws: Sequence[Draw], prompts: Sequence[Prompt]) -> dict[str, Tensor]:
        if self._pictures is None:
            return walk(self.teacher, self.strategy, self.grid, text, self._null, draws)
        _, height, width = self.teacher.latent_shape
        factor = int(self.teacher.pipeline.vae_scale_factor)
        latents = self._pictures.latents(self.teacher.pipeline, prompts, height=height * factor, width=width * factor)
        return noise_pictures(self.teacher, self.strategy, self.grid, text, self._null, draws, latents)

    def _on_device(self, tensors: dict[str, Tensor]) -> TextEmbeddings:
        return TextEmbeddings(tensors["tokens"].to(self.teacher.device), tensors["pooled"].to(self.teacher.device))


def main() -> None:
    """Entry of one of several workers: ``torchrun --nproc-per-node N -m teefusion.target_sets --settings FILE ...``."""
    parser = argparse.ArgumentParser(prog="python -m teefusion.target_sets", description="One worker on a target set.")
    parser.add_argument("--settings", type=Path, help=f"JSON of the run's settings; none is {JOB_VARIABLE}")
    parser.add_argument("--prompts", type=Path, required=True, help="folder of the prompt set")
    parser.add_argument("--output", required=True, help="folder or s3:// URI of the target set")
    arguments = parser.parse_args()
    from teefusion.logs import setup_logging

    setup_logging()
    try:
        settings = job_settings(arguments.settings)
        store = open_store(arguments.output, settings.storage)
        generate_tracked(settings, load_prompt_set(arguments.prompts), store)
    except TeEFusionError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
