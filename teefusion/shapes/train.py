"""Train the bundled teacher and its arbiter: ``python -m teefusion.shapes.train --output DIR``.

The same plan gives the same weights on the same machine type and versions. An interrupted run, started again with the
same options, goes on from the last finished part.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from teefusion.errors import TeEFusionError
from teefusion.shapes.plan import Plan


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    output, preview_every, as_json = (options.pop(name) for name in ("output", "preview_every", "json"))
    try:
        plan = Plan(**options)
    except ValueError as error:
        parser.error(str(error))
    # Only now, so that help and a refused option do not wait for torch.
    from teefusion.logs import setup_logging
    from teefusion.shapes.build import build

    setup_logging()
    try:
        facts = build(output, plan, preview_every=preview_every)
    except TeEFusionError as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(json.dumps(facts) + "\n" if as_json else _summary(output, facts))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m teefusion.shapes.train", description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for teacher, scorer and training.json")
    parser.add_argument(
        "--preview-every", type=int, default=0, help="steps between looks at the teacher (default 0: none)"
    )
    parser.add_argument("--json", action="store_true", help="print the measured facts as JSON")
    for name, value in asdict(Plan()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, help=f"default {value}")
    return parser


def _summary(output: Path, facts: dict[str, dict[str, dict[str, float]]]) -> str:
    guidance = facts["guidance"]
    s1, s4 = (f"{guidance[s]['mean']:.1f} ± {guidance[s]['standard_error'] or 0:.1f}" for s in ("s1", "s4"))
    return f"{output}: score {s1} at guidance scale 1, {s4} at 4. All facts are in training.json.\n"


if __name__ == "__main__":
    main()
