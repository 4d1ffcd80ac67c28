"""The bundled prompt set, one caption for every scene: ``python -m teefusion.shapes.prompts [--output FILE]``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from teefusion.files import write_bytes
from teefusion.shapes import PROMPTS_FILE
from teefusion.shapes.drawings import all_scenes


def prompt_lines() -> list[str]:
    """``{"prompt", "style"}`` of every scene, as JSON, in the order of the scenes."""
    return [json.dumps({"prompt": scene.caption, "style": scene.style}) for scene in all_scenes()]


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m teefusion.shapes.prompts", description=__doc__)
    parser.add_argument("--output", type=Path, default=PROMPTS_FILE, help="file to write (default: %(default)s)")
    output: Path = parser.parse_args(arguments).output
    write_bytes(output, ("\n".join(prompt_lines()) + "\n").encode())


if __name__ == "__main__":
    main()
