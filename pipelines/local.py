"""Run the pipeline on this machine with kfp.local, every task in its own process."""

import contextlib
import os
import sys
import warnings

from kfp import local

from teefusion.errors import PipelineError, UsageError
from teefusion.pipelines.distill import distill
from teefusion.progress import TTY_VARIABLE
from teefusion.settings import Settings
from teefusion.storage import read_json
from teefusion.tracking import check_server
from teefusion.workspace import Workspace


def run(settings: Settings) -> dict:
    """Run the pipeline of pinned settings; returns the summary. Raises PipelineError or UsageError when it fails."""
    check_server(settings)  # before anything is spent
    workspace = Workspace(settings)
    workspace.start()
    if sys.stderr.isatty():
        os.environ[TTY_VARIABLE] = os.ttyname(sys.stderr.fileno())
    local.init(
        runner=local.SubprocessRunner(use_venv=False),
        pipeline_root=str(workspace.root / "kfp"),
        raise_on_error=True,
    )
    try:
        # kfp.local logs to standard output, which belongs to the answer.
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            distill(settings=settings.stored())
    except RuntimeError as error:
        failure = workspace.failure()
        if failure is None:
            raise PipelineError(f"The pipeline failed: {error}. The failed task's output is above.") from error
        kind = UsageError if failure["exit_code"] == UsageError.exit_code else PipelineError
        raise kind(f"{failure['stage']} failed: {failure['message']}") from error
    summary: dict = read_json(workspace.run / "summary.json")
    return summary
