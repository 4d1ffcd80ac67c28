"""Where a run keeps what it makes: one folder a thing, named by what determines its content.

<workdir>/prompts/KEY/        prompt set
<workdir>/targets/KEY/        target set, unless storage.uri says where else
<workdir>/cache/              shards read from S3
<workdir>/models/DIGEST/      students of the registry that lie elsewhere
<workdir>/students/KEY/       checkpoints, the student folder, training.json
<workdir>/evaluations/KEY/    pictures, scores, verdict, report.html
<workdir>/comparisons/KEY/    the same of 'teefusion compare', without a verdict
<workdir>/versions/DIGEST/    students fetched from a registry
<workdir>/runs/RUN_KEY/       settings, one record a stage, summary
<workdir>/report.html, summary.json   of the last run
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from teefusion.errors import IntegrityError
from teefusion.files import read_json, write_bytes, write_json
from teefusion.settings import Settings, settings_from_json
from teefusion.storage import join

StageName = Literal["ingest", "targets", "train", "evaluate", "register"]
Work = Callable[[], tuple[dict[str, Any], bool]]
"""A stage's work: returns details, and whether all was there already."""
STAGES: tuple[StageName, ...] = get_args(StageName)


@dataclass(frozen=True)
class StageResult:
    """What a stage gives to the next one and to the summary."""

    stage: StageName
    output: str
    """A folder, or the URI of a target set in S3."""
    reused: bool
    seconds: float
    details: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"seconds": round(self.seconds, 3)}


@dataclass(frozen=True)
class Workspace:
    """Paths below the workdir of one run."""

    settings: Settings

    @property
    def root(self) -> Path:
        """The workdir, absolute."""
        return self.settings.workdir.resolve()

    @property
    def run(self) -> Path:
        """This run's records."""
        return self.root / "runs" / self.settings.run_key

    def folder(self, kind: Literal["prompts", "students", "evaluations", "comparisons", "versions"], key: str) -> Path:
        """Folder of one content-addressed thing."""
        return self.root / kind / key

    def target_uri(self, key: str) -> str:
        """Folder or URI of a target set, the one thing that may lie elsewhere (``storage.uri``)."""
        return join(self.settings.storage.uri or str(self.root), "targets", key)

    @property
    def cache(self) -> Path:
        """What was read from S3, as long as there is room."""
        return self.root / "cache"

    @property
    def models(self) -> Path:
        """Students fetched for the registry's sake, named by their digests."""
        return self.root / "models"

    def stage(self, name: StageName, output: Path | str, work: Work) -> StageResult:
        """Do a stage's work, time it, and record it; of alike steps of a run, the one that made something is told."""
        started = time.monotonic()
        details, reused = work()
        result = StageResult(name, str(output), reused, time.monotonic() - started, details)
        if not (reused and self.records().get(name, {}).get("output") == result.output):
            write_json(self._record(name), result.to_dict())
        return result

    def start(self) -> None:
        """Begin a run: store its settings, forget an earlier attempt's records."""
        for path in (*(self._record(name) for name in STAGES), self._failure):
            path.unlink(missing_ok=True)
        write_bytes(self.run / "settings.json", self.settings.to_json().encode())

    def refer_to(self, pinned: Settings) -> None:
        """Leave word of the settings that these have become, once they were pinned."""
        write_bytes(self.run / "settings.json", pinned.to_json().encode())

    def referred(self) -> Settings:
        """The settings that these have become, or they themselves."""
        path = self.run / "settings.json"
        return settings_from_json(path.read_text(encoding="utf-8")) if path.exists() else self.settings

    def records(self) -> dict[str, dict[str, Any]]:
        """Records of the stages that ended well, by name, in order."""
        return {name: read_json(self._record(name)) for name in STAGES if self._record(name).exists()}

    def fail(self, stage: str, message: str, exit_code: int) -> None:
        """Record why a stage ended, for the process that started the pipeline; the orchestrator loses exit codes."""
        write_json(self._failure, {"stage": stage, "message": message, "exit_code": exit_code})

    def failure(self) -> dict[str, Any] | None:
        """What ``fail`` recorded in this attempt, or none."""
        return read_json(self._failure) if self._failure.exists() else None

    @property
    def _failure(self) -> Path:
        return self.run / "failure.json"

    def _record(self, name: StageName) -> Path:
        return self.run / f"{name}.json"


def require(path: Path, *, command: str, what: str) -> Path:
    """``path``, or IntegrityError saying which command makes it."""
    if not path.exists():
        raise IntegrityError(f"There is no {what} for these settings ({path} is missing). Run '{command}' first.")
    return path
