"""The ``teefusion`` command. Imports lazily, so that help and mistakes answer at once.

Exit codes: 0 done, 1 something failed, 2 the request was wrong. Results go to standard output (one JSON object with
``--json``), everything else to standard error.
"""

from teefusion.cli import kubeflow, pictures, registry, stages  # noqa: F401  # each adds its commands to ``cli``
from teefusion.cli.command import cli

__all__ = ["cli", "main"]


def main() -> None:
    """Entry of the console script."""
    cli()
