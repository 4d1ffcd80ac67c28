"""All that is compared, on one device: the rows, the scorer, the prompts; and one of several processes at it."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from teefusion.claims import forget_claims
from teefusion.devices import local_device
from teefusion.errors import TeEFusionError
from teefusion.evaluation import choose_prompts, score_rows
from teefusion.group_means import Mean
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

    def sweep(self) -> dict[str, list[SweepPoint]]:
        """Teacher and student over guidance scales; see ``sweeps``."""
        options = self.settings.evaluate
        return guidance_sweep(
            self._of("teacher", "student"), self.scorer, self.spread(options.sweep_prompts), options.sweep
        )

    def diversity(self) -> dict[str, Mean]:
        """Of teacher, student and the unguided teacher, which guidance makes more alike; see ``sweeps``."""
        options = self.settings.evaluate
        chosen = self.spread(options.diversity_prompts)
        return diversity(self._of("unguided", "teacher", "student"), self.scorer, chosen, seeds=options.diversity_seeds)

    def spread(self, count: int) -> list[Prompt]:
        """So many of the prompts at most, from all styles: every n-th."""
        return list(self.prompts[:: max(1, len(self.prompts) // count)][:count])

    @property
    def memory_kind(self) -> str:
        """What the rows' peak memory is of."""
        return memory_kind(next(iter(self.rows.values())).device)

    def _of(self, *rows: str) -> dict[str, Sampler]:
        return {row: self.rows[row] for row in rows}

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
