"""Run the pipeline on this machine with kfp.local, every task in its own process."""

import contextlib
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from kfp import local

from teefusion.errors import PipelineError, UsageError
from teefusion.files import read_json
from teefusion.logs import STAGE_MARK
from teefusion.parameters import arguments_of
from teefusion.pipelines.distill import make_pipeline
from teefusion.progress import TTY_VARIABLE
from teefusion.settings import Settings
from teefusion.sources import require_fitting_scorer
from teefusion.stages.summary import summarize
from teefusion.workspace import Workspace

_STOP_PATIENCE_S = 60.0  # for a step to write a checkpoint


def run(settings: Settings) -> dict:  # type: ignore[type-arg]
    """Run the pipeline of pinned settings; returns the summary. Raises PipelineError or UsageError when it fails."""
    require_fitting_scorer(settings)  # before anything is spent
    workspace = Workspace(settings)
    workspace.start()
    if sys.stderr.isatty():
        os.environ[TTY_VARIABLE] = os.ttyname(sys.stderr.fileno())
    local.init(
        runner=local.SubprocessRunner(use_venv=False), pipeline_root=str(workspace.root / "kfp"), raise_on_error=True
    )
    log = workspace.run / "pipeline.log"
    try:
        with _output_to(log), _stoppable():
            make_pipeline(_for_here(settings))(**arguments_of(settings))
    except (KeyboardInterrupt, SystemExit):
        summarize(settings, error="the run was stopped", outcome="cancelled")
        raise
    except RuntimeError as error:
        failure = workspace.failure()
        if failure is None:
            raise PipelineError(f"The pipeline failed: {error}. All output of its tasks is in {log}.") from error
        kind = UsageError if failure["exit_code"] == UsageError.exit_code else PipelineError
        raise kind(f"{failure['stage']} failed: {failure['message']}") from error
    summary: dict = read_json(workspace.run / "summary.json")  # type: ignore[type-arg]
    return summary


def _for_here(settings: Settings) -> Settings:
    """Without retries, whose pauses kfp.local would honour: here somebody waits for the answer.

    And of a loop no more than the two tasks that it has at work at once: it would begin the others when told to stop.
    """
    cluster = settings.cluster.model_copy(update={"retries": 0, "steps": {}})
    targets = settings.targets.model_copy(update={"shard_groups": min(settings.targets.shard_groups, 2)})
    return settings.model_copy(update={"cluster": cluster, "targets": targets})


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """SIGTERM and Ctrl-C stop the step at work, too, and wait for it: kfp.local, whose child is a shell, would not."""

    def stop(number: int, _frame: object) -> None:
        shells = _children(os.getpid())
        steps = [step for shell in shells for step in _children(shell)] or shells
        for step in steps:
            with contextlib.suppress(ProcessLookupError):
                os.kill(step, signal.SIGTERM)
        end = time.monotonic() + _STOP_PATIENCE_S
        while any(map(_is_alive, steps)) and time.monotonic() < end:
            time.sleep(0.1)
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _children(process: int) -> list[int]:
    with contextlib.suppress(OSError):
        tasks = Path(f"/proc/{process}/task").iterdir()
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return []


def _is_alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


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
