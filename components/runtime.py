"""What every component does around its stage: settings, logging, an error's exit code, and the word of a cancel."""

import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from teefusion.errors import ClusterError, StorageError, TeEFusionError, UsageError
from teefusion.files import write_bytes
from teefusion.logs import STAGE_MARK, setup_logging
from teefusion.parameters import POD_VARIABLE, settings_of
from teefusion.settings import Settings, settings_from_json
from teefusion.workspace import StageName, StageResult, Workspace

log = logging.getLogger("teefusion")


def run_stage(name: StageName, settings: str, **inputs: str) -> StageResult:
    """Run a stage on folders given as strings; targets may be a URI.

    An error of ours ends the task with its exit code and one message. A user's mistake is not tried again: Kubeflow
    would, as it cannot tell one exit code from another, so a second attempt finds the message of the first and ends.
    """
    setup_logging(mark=STAGE_MARK)
    parsed = settings_from_json(settings)
    _take_variables(parsed)
    log.info("== %s", name)
    _refuse_to_repeat(Workspace(parsed), name)
    with _told(Workspace(parsed), name):
        stage = getattr(import_module(f"teefusion.stages.{name}"), name)
        given = {key: value if key == "targets" else Path(value) for key, value in inputs.items()}
        result: StageResult = stage(parsed, **given)
    log.info("   %s: %s", "found made" if result.reused else f"done in {result.seconds:.1f} s", result.output)
    return result


def write_record(result: StageResult, path: str) -> None:
    """Write for Kubeflow's page what a stage made."""
    from teefusion.stages.summary import record_markdown

    write_bytes(Path(path), record_markdown(result).encode())


def run_preflight(arguments: dict[str, Any], report: str) -> str:
    """Check all that the run needs, begin it, and return its settings as JSON. Ends the task as ``run_stage``."""
    setup_logging(mark=STAGE_MARK)
    log.info("== preflight")
    settings = _settings(arguments)
    _take_variables(settings)
    with _told(Workspace(settings), "preflight"):
        with contextlib.suppress(StorageError):  # of which the check of the workdir tells, beside the others
            Workspace(settings).start()  # forgets what an earlier run left
        from teefusion.preflight import preflight, require_ready, to_markdown

        pinned, findings = preflight(settings)
        write_bytes(Path(report), to_markdown(findings).encode())
        require_ready(findings)
        Workspace(pinned).start()
        Workspace(settings).refer_to(pinned)
        if pinned.targets.shard_groups > 1:  # who begin at once would each make a run in MLflow
            from teefusion.tracking import Tracker

            Tracker.open(pinned).close()
    log.info("   all is there")
    return pinned.to_json()


def run_summary(arguments: dict[str, Any], record: str, *, state: str, error: str | None) -> None:
    """Write the summary of whatever ended, as the steps began it, and delete the TrainJobs that it left at work.

    ``record`` is the file for what Kubeflow's page shows of it.
    """
    setup_logging(mark=STAGE_MARK)
    settings = Workspace(_settings(arguments)).referred()
    _take_variables(settings)
    from teefusion.stages.summary import outcome_markdown, outcome_of, summarize

    failed = state != "SUCCEEDED"
    if failed and any(settings.cluster.takes_trainjob(stage) for stage in ("targets", "train")):
        _delete_trainjobs(settings)  # first, as it costs by the minute and the disk may be full
    try:
        outcome, failure = outcome_of(Workspace(settings), state), Workspace(settings).failure()
        # A step's own word says more than Kubeflow's, which may be empty.
        why = f"{failure['stage']}: {failure['message']}" if failure else error or f"the pipeline ended {state}"
        summary = summarize(settings, error=why if failed else None, outcome=outcome)
        write_bytes(Path(record), outcome_markdown(summary).encode())
    except TeEFusionError as problem:
        log.error("%s", problem)
        sys.exit(problem.exit_code)


def _delete_trainjobs(settings: Settings) -> None:
    from teefusion.cluster import Cluster
    from teefusion.jobs import delete_orphans

    try:
        delete_orphans(Cluster(settings.cluster), settings.run_key)
    except ClusterError as problem:
        log.error("%s", problem)


def _settings(arguments: dict[str, Any]) -> Settings:
    try:
        return settings_of(arguments)
    except TeEFusionError as error:  # there is no workdir yet in which to leave the message
        log.error("%s", error)
        sys.exit(error.exit_code)


def _take_variables(settings: Settings) -> None:
    """Set what the namespace's ConfigMap adds to ``cluster.env``: who compiled the pipeline need not have known it."""
    if POD_VARIABLE in os.environ:
        os.environ.update(settings.cluster.variables)


def _refuse_to_repeat(workspace: Workspace, name: StageName) -> None:
    earlier = workspace.failure()
    if earlier and earlier["stage"] == name and earlier["exit_code"] == UsageError.exit_code:
        log.error("%s: %s (An earlier attempt found this. Correct it, and start a new run.)", name, earlier["message"])
        sys.exit(UsageError.exit_code)


@contextlib.contextmanager
def _told(workspace: Workspace, name: str) -> Iterator[None]:
    """Leave the reason of an end in the run's folder, and end with its exit code; 143 where the step was stopped."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    except TeEFusionError as error:
        log.error("%s: %s", name, error)
        _end(workspace, name, str(error), error.exit_code)
    except (SystemExit, KeyboardInterrupt):
        log.warning("%s: stopped", name)
        _end(workspace, name, "it was stopped", 128 + signal.SIGTERM)


def _end(workspace: Workspace, name: str, message: str, code: int) -> NoReturn:
    from teefusion.stages.summary import STOPPED, summarize

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):  # who asks twice waits for the last words all the same
            signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(StorageError):
        workspace.fail(name, message, code)
    if code in STOPPED:  # a cancelled run may get no further step, not even its exit handler's
        try:
            summarize(workspace.settings, error=message, outcome="cancelled")
        except StorageError as problem:
            log.error("%s", problem)
    sys.exit(code)
