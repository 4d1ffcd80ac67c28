"""All that is compared, on one device: the rows, the scorer, the prompts; and one of several processes at it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from teefusion.claims import forget_claims
from teefusion.devices import local_device
from teefusion.errors import TeEFusionError
from teefusion.evaluation import choose_prompts, score_rows, spread
from teefusion.group_means import Mean, benchmark_score, by_style, style_means
from teefusion.memory import memory_kind
from teefusion.prompts import Prompt, load_prompt_set
from teefusion.samplers import Sampler, samplers
from teefusion.scorer_sources import ScorerSource, scorer_of
from teefusion.scoring import Scorer, load_scorer
from teefusion.settings import Settings, settings_from_json
from teefusion.storage import FolderStore
from teefusion.students import load_student
from teefusion.sweeps import SweepPoint, diversity, guidance_sweep
from teefusion.teachers import load_teacher
from teefusion.weights import with_weights

log = logging.getLogger("teefusion.evaluate")


@dataclass(frozen=True)
class Comparison:
    """Rows, ready to draw, and what judges them."""

    settings: Settings
    rows: dict[str, Sampler]
    scorer: Scorer
    prompts: Sequence[Prompt]
    output: Path
    """The evaluation's folder."""

    def score(self) -> dict[str, list[float]]:
        """Scores a prompt for each row; what is recorded in the folder is not made again. See ``score_rows``."""
        return score_rows(
            self.rows,
            self.scorer,
            self.prompts,
            self.settings.evaluate,
            self.output,
            records=self._records,
        )

    def measured(self, scores: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        """What scoring gave, JSON-ready. Seconds, forwards and memory are those of the scored batches."""
        styles = [prompt.style for prompt in self.prompts]
        texts = [prompt.text for prompt in self.prompts]
        benchmarks = {row: benchmark_score(by_style(values, styles)) for row, values in scores.items()}
        return {
            "scores": {
                row: {style: asdict(mean) for style, mean in style_means(values, styles).items()}
                for row, values in scores.items()
            },
            "benchmark": {row: score and score.to_dict() for row, score in benchmarks.items()},
            "per_prompt": [
                {"prompt": prompt.text, "style": prompt.style} | {row: scores[row][k] for row in scores}
                for k, prompt in enumerate(self.prompts)
            ],
            "guidance_scale": {row: sampler.guidance_scale for row, sampler in self.rows.items()},
            "nfe": {row: sampler.nfe for row, sampler in self.rows.items()},
            "seconds_per_image": {row: sampler.timing() for row, sampler in self.rows.items()},
            "memory": {
                "kind": memory_kind(next(iter(self.rows.values())).device),
                "peak_bytes": {row: sampler.peak_bytes for row, sampler in self.rows.items()},
            },
            "scorer": self.scorer.describe() | {"prompts_cut": len(self.scorer.too_long(texts))},
        }

    def sweep(self, rows: Sequence[str]) -> dict[str, list[SweepPoint]]:
        """These rows over guidance scales; see ``sweeps``."""
        options, chosen = self.settings.evaluate, {row: self.rows[row] for row in rows}
        prompts = self.spread(options.sweep_prompts)
        return guidance_sweep(chosen, self.scorer, prompts, options.sweep, batch_size=options.batch_size)

    def diversity(self, rows: Sequence[str]) -> dict[str, Mean]:
        """Of these rows; see ``sweeps``."""
        options, chosen = self.settings.evaluate, {row: self.rows[row] for row in rows}
        prompts = self.spread(options.diversity_prompts)
        return diversity(chosen, self.scorer, prompts, seeds=options.diversity_seeds, batch_size=options.batch_size)

    def spread(self, count: int) -> list[Prompt]:
        """So many of the prompts at most, from all styles."""
        return spread(self.prompts, count)

    def forget_claims(self) -> None:
        """Remove what processes left behind in sharing out the batches, once all are scored."""
        forget_claims(FolderStore(self._records))

    @property
    def _records(self) -> Path:
        return self.output / "scored"


def open_comparison(
    settings: Settings,
    prompts: Path,
    student: Path,
    output: Path,
    *,
    champion: Path | None = None,
    source: ScorerSource | None = None,
) -> Comparison:
    """Load everything. Raises StudentError, ScorerError, TeacherError, PromptError."""
    device = local_device(settings.device)
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)  # so that waiting for the device, when time is taken, waits for this one
    chosen = choose_prompts(load_prompt_set(prompts).heldout, settings.evaluate)
    teacher = with_weights(load_teacher(settings.teacher, device=device), settings.strategy)
    dtype = teacher.pipeline.transformer.dtype
    pipelines = [folder and load_student(folder, device=teacher.device, dtype=dtype) for folder in (student, champion)]
    scorer = load_scorer(source or scorer_of(settings), device=device)
    return Comparison(settings, samplers(settings, teacher, *pipelines), scorer, chosen, output)


def main() -> None:
    """Entry of one of several processes: ``torchrun --nproc-per-node N -m teefusion.comparison ...``."""
    parser = argparse.ArgumentParser(prog="python -m teefusion.comparison", description="Score part of an evaluation.")
    parser.add_argument("--settings", type=Path, required=True, help="JSON of the run's settings")
    parser.add_argument("--prompts", type=Path, required=True, help="folder of the prompt set")
    parser.add_argument("--student", type=Path, required=True, help="folder of the student")
    parser.add_argument("--champion", type=Path, help="folder of the champion, where there is one")
    parser.add_argument("--output", type=Path, required=True, help="folder of the evaluation")
    arguments = parser.parse_args()
    from teefusion.logs import setup_logging

    setup_logging()
    settings = settings_from_json(arguments.settings.read_text())
    try:
        compared = open_comparison(
            settings, arguments.prompts, arguments.student, arguments.output, champion=arguments.champion
        )
        compared.score()
    except TeEFusionError as error:
        log.error("%s", error)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
