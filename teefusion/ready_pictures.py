"""Score pictures that are there already, laid out as the HPS v2 benchmark's: ``<style>/<index>.jpg``.

The index is the prompt's place in its style's list. Batches are recorded under the digests of their pictures, so an
interrupted run goes on where it stopped, a mended picture costs its batch, and any number of processes share them out.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

from PIL import Image

from teefusion.claims import forget_claims, work_through
from teefusion.errors import SettingsError, TeEFusionError, UsageError
from teefusion.files import content_key, json_bytes, read_json, sha256_file, write_json
from teefusion.group_means import BenchmarkScore, Mean, benchmark_score, by_style, style_means
from teefusion.launch import run_scoring
from teefusion.pictures import read_picture
from teefusion.progress import Progress
from teefusion.prompt_files import read_prompts, source_digest
from teefusion.prompts import Prompt, normalise
from teefusion.scorer_names import BUNDLED, Transparency
from teefusion.scorer_sources import ScorerSource, scorer_of
from teefusion.settings import Settings, settings_from_json
from teefusion.sources import prompt_path
from teefusion.storage import FolderStore
from teefusion.workspace import Workspace

log = logging.getLogger("teefusion.evaluate")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True)
class Pair:
    """A picture and what it was drawn for."""

    file: Path
    prompt: Prompt


def pair(folder: Path, prompts: Sequence[Prompt]) -> list[Pair]:
    """The picture of every prompt, style by style. Raises UsageError unless each has exactly one, and none is over."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder. Give --images the one that holds <style>/<index>.jpg.")
    styles = {style: [p for p in prompts if p.style == style] for style in sorted({p.style for p in prompts})}
    strange = sorted(
        path.name for path in folder.iterdir() if path.name not in styles and not path.name.startswith(".")
    )
    if strange:
        raise UsageError(
            f"{folder} holds {strange[0]!r}{f' and {len(strange) - 1} more' if len(strange) > 1 else ''}, which is no "
            f"style of the prompts ({', '.join(styles)}). Take it out, or name the pictures' own prompts: --prompts."
        )
    return [found for style, members in styles.items() for found in _pair_style(folder / style, members)]


def _pair_style(folder: Path, prompts: Sequence[Prompt]) -> list[Pair]:
    files = sorted(path for path in folder.glob("*") if not path.name.startswith("."))
    by_index: dict[int, Path] = {}
    for path in files:
        index = int(path.stem) if path.stem.isascii() and path.stem.isdigit() else None
        if path.suffix.lower() not in SUFFIXES or index is None or index in by_index or index >= len(prompts):
            raise UsageError(
                f"{path} is no picture of one of {len(prompts)} prompts: names are 00000.jpg to "
                f"{len(prompts) - 1:05d}.jpg (or {', '.join(SUFFIXES[1:])}), one each. Take it out, or rename it."
            )
        by_index[index] = path
    if missing := [index for index in range(len(prompts)) if index not in by_index]:
        raise UsageError(
            f"{folder} has {len(by_index)} pictures for {len(prompts)} prompts: {len(missing)} missing, the first is "
            f"{missing[0]:05d}.jpg. Make them, or name the pictures' own prompts: --prompts."
        )
    return [Pair(by_index[index], prompt) for index, prompt in enumerate(prompts)]


def score_pictures(settings: Settings, folder: Path) -> dict[str, Any]:
    """Scores by style and overall of the pictures in ``folder``, against the prompts of ``prompts.source``.

    Raises UsageError for pictures that do not fit the prompts, SettingsError for a toy scorer of real pictures,
    ScorerError for a picture that cannot be scored, PromptError, StorageError; TeEFusionError where one of several
    processes failed.
    """
    work = _Work.of(settings, folder)
    run_scoring(settings, "teefusion.ready_pictures", {"images": folder})
    scores, described = work.score()
    forget_claims(work.store)
    styles = [member.prompt.style for member in work.pairs]
    benchmark = benchmark_score(by_style(scores, styles))
    result = {
        "images": str(folder),
        "pictures": len(work.pairs),
        "scores": {style: asdict(mean) for style, mean in style_means(scores, styles).items()},
        "benchmark": benchmark and benchmark.to_dict(),
        "scorer": described,
    }
    per_picture = [
        {"file": member.file.relative_to(folder).as_posix(), "prompt": member.prompt.text, "score": score}
        for member, score in zip(work.pairs, scores, strict=True)
    ]
    file = work.output / f"{content_key(per_picture)}.json"
    write_json(file, result | {"per_picture": per_picture})
    return result | {"output": str(file)}


@dataclass(frozen=True)
class _Work:
    """What is scored, by what, and where that is recorded: the same in every process."""

    settings: Settings
    source: ScorerSource
    pairs: Sequence[Pair]
    output: Path

    @classmethod
    def of(cls, settings: Settings, folder: Path) -> _Work:
        if settings.evaluate.scorer == BUNDLED and settings.prompts.source != BUNDLED:
            raise SettingsError(
                f"evaluate.scorer is {BUNDLED}, which can only judge the bundled prompts. Name a real scorer: --scorer "
                "hps:/models/HPS_v2.1_compressed.pt, clip:openai/clip-vit-large-patch14, ... (docs/evaluation.md)."
            )
        prompts = prompt_path(settings.prompts.source)
        pairs = pair(folder, [Prompt(normalise(prompt.text), prompt.style) for prompt in read_prompts(prompts)])
        source = scorer_of(settings)
        key = content_key({"prompts": source_digest(prompts), "scorer": source.identity()})
        return cls(settings, source, pairs, Workspace(settings).folder("evaluations", key))

    @property
    def store(self) -> FolderStore:
        return FolderStore(self.output / "scored")

    def score(self) -> tuple[list[float], dict[str, Any]]:
        """A score a pair, batch by batch, and what the scorer says of itself."""
        from teefusion.devices import local_device
        from teefusion.scoring import load_scorer

        size, store = self.settings.evaluate.batch_size, self.store
        scorer = load_scorer(self.source, device=local_device(self.settings.device))
        parts = [self.pairs[start : start + size] for start in range(0, len(self.pairs), size)]
        names = [_record_name(part) for part in parts]
        batches = dict(zip(names, parts, strict=True))  # one where the same pictures come twice

        def find(name: str) -> list[float] | None:
            return None if store.size(name) is None else read_json(store.folder / name)["scores"]

        def make(name: str) -> list[float]:
            images = _Pictures([member.file for member in batches[name]], self.source.transparency)
            scores = scorer.score(images, [member.prompt.text for member in batches[name]])
            store.write(name, json_bytes({"scores": scores}))
            return scores

        first = os.environ.get("RANK", "0") == "0"
        with Progress("evaluate", total=len(self.pairs), unit="picture", enabled=first) as progress:
            done = work_through(store, list(batches), find, make, found=lambda scores, _: progress.advance(len(scores)))
        cut = len(scorer.too_long([member.prompt.text for member in self.pairs]))
        return [score for name in names for score in done[name]], scorer.describe() | {"prompts_cut": cut}


class _Pictures(Sequence[Image.Image]):
    """Each read when it is asked for: a batch of large ones is never in memory whole."""

    def __init__(self, files: Sequence[Path], transparency: Transparency) -> None:
        self._files, self._transparency = files, transparency

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Image.Image: ...
    @overload
    def __getitem__(self, index: slice) -> _Pictures: ...
    def __getitem__(self, index: int | slice) -> Image.Image | _Pictures:
        if isinstance(index, slice):
            return _Pictures(self._files[index], self._transparency)
        return read_picture(self._files[index], transparency=self._transparency)


def main() -> None:
    """Entry of one of several processes: ``torchrun --nproc-per-node N -m teefusion.ready_pictures ...``."""
    parser = argparse.ArgumentParser(prog="python -m teefusion.ready_pictures", description="Score part of a folder.")
    parser.add_argument("--settings", type=Path, required=True, help="JSON of the run's settings")
    parser.add_argument("--images", type=Path, required=True, help="folder of <style>/<index>.jpg")
    arguments = parser.parse_args()
    from teefusion.logs import setup_logging

    setup_logging()
    try:
        _Work.of(settings_from_json(arguments.settings.read_text()), arguments.images).score()
    except TeEFusionError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


def _record_name(batch: Sequence[Pair]) -> str:
    return content_key([[sha256_file(member.file), member.prompt.digest] for member in batch]) + ".json"


def table(result: Mapping[str, Any]) -> str:
    """The result as a person reads it: the benchmark's numbers where it applies, else means and standard errors."""
    scorer = result["scorer"]
    lines = [f"{scorer['name']}, {result['pictures']:,} pictures"]
    if result["benchmark"]:
        score = BenchmarkScore.from_dict(result["benchmark"])
        for style, mean in score.styles.items():
            spread = "" if mean.deviation is None else f" ± {mean.deviation:.2f}"
            lines.append(f"  {style:<16}{mean.mean:.2f}{spread}  ({mean.groups} groups of {score.group_size})")
        lines.append(f"  {'average':<16}{score.average:.2f}")
    else:
        for style, value in result["scores"].items():
            of_style = Mean(**value)
            lines.append(f"  {style:<16}{of_style.mean:.2f} ± {of_style.standard_error:.2f}  ({of_style.n} pictures)")
    if scorer["prompts_cut"]:
        lines.append(f"  prompts longer than the scorer reads, scored by their beginning: {scorer['prompts_cut']:,}")
    return "\n".join([*lines, f"  {result['output']}"])


if __name__ == "__main__":
    main()
