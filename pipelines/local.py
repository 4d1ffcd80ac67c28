"""Run the pipeline on this machine with kfp.local, every task in its own process."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from kfp import local

from teefusion.errors import PipelineError, UsageError
from teefusion.files import read_json
from teefusion.logs import STAGE_MARK
from teefusion.pipelines.distill import distill
from teefusion.progress import TTY_VARIABLE
from teefusion.settings import Settings
from teefusion.sources import require_fitting_scorer
from teefusion.tracking import check_server
from teefusion.workspace import Workspace


def run(settings: Settings) -> dict:  # type: ignore[type-arg]
    """Run the pipeline of pinned settings; returns the summary. Raises PipelineError or UsageError when it fails."""
    require_fitting_scorer(settings)  # before anything is spent
    check_server(settings)
    workspace = Workspace(settings)
    workspace.start()
    if sys.stderr.isatty():
        os.environ[TTY_VARIABLE] = os.ttyname(sys.stderr.fileno())
    local.init(
        runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(workspace.root / "kfp"), raise_on_error=True
    )
    log = workspace.run / "pipeline.log"
    try:
        with _output_to(log):
            distill(settings=settings.to_json())
    except RuntimeError as error:
        failure = workspace.failure()
        if failure is None:
            raise PipelineError(f"The pipeline failed: {error}. All output of its tasks is in {log}.") from error
        kind = UsageError if failure["exit_code"] == UsageError.exit_code else PipelineError
        raise kind(f"{failure['stage']} failed: {failure['message']}") from error
    summary: dict = read_json(workspace.run / "summary.json")  # type: ignore[type-arg]
    return summary


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Everything kfp.local and its tasks print goes to a file, and what stages mean for a person to standard error."""
    with path.open("w", encoding="utf-8") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with contextlib.redirect_stdout(_Console(file, sys.stderr)):
            yield


class _Console(io.TextIOBase):
    """Writes all to a file, and the lines that stages marked to a terminal, without the mark."""

    def __init__(self, file: TextIO, terminal: TextIO) -> None:
        self._file, self._terminal, self._line = file, terminal, ""

    def write(self, text: str) -> int:
        self._file.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            _, marked, message = line.partition(STAGE_MARK)
            if marked:
                self._terminal.write(f"{message}\n")
                self._terminal.flush()
        return len(text)
