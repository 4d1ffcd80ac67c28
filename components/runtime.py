"""What every component does around its stage: settings, logging, and an error's exit code."""

import logging
import sys
from importlib import import_module
from pathlib import Path

from teefusion.errors import TeEFusionError
from teefusion.logs import STAGE_MARK, setup_logging
from teefusion.settings import settings_from_json
from teefusion.workspace import StageName, StageResult, Workspace

log = logging.getLogger("teefusion")


def run_stage(name: StageName, settings: str, **inputs: str) -> StageResult:
    """Run a stage on folders given as strings; targets may be a URI.

    An error of ours ends the task with its exit code and one message.
    """
    setup_logging(mark=STAGE_MARK)
    parsed = settings_from_json(settings)
    log.info("== %s", name)
    try:
        stage = getattr(import_module(f"teefusion.stages.{name}"), name)
        given = {key: value if key == "targets" else Path(value) for key, value in inputs.items()}
        result: StageResult = stage(parsed, **given)
    except TeEFusionError as error:
        Workspace(parsed).fail(name, str(error), error.exit_code)
        log.error("%s: %s", name, error)
        sys.exit(error.exit_code)
    log.info("   %s: %s", "found made" if result.reused else f"done in {result.seconds:.1f} s", result.output)
    return result


def run_summary(settings: str, *, error: str | None) -> None:
    """Write the summary of whatever ended."""
    from teefusion.stages.summary import summarize

    setup_logging(mark=STAGE_MARK)
    summarize(settings_from_json(settings), error=error)
