"""What a student folder says of itself, read without the models' libraries: mistakes are told before they load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from teefusion.errors import StudentError

_NAME = "model_index.json"


def read_index(folder: Path) -> dict[str, Any]:
    """The folder's list of parts. Raises StudentError where there is none."""
    try:
        index = json.loads((folder / _NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StudentError(
            f"{folder} is no student folder: {_NAME} is missing. Give the folder that 'teefusion train' reported, for "
            "example WORKDIR/students/KEY/student."
        ) from error
    except (OSError, ValueError) as error:
        raise StudentError(f"{folder / _NAME} cannot be read: {error}.") from error
    if not isinstance(index, dict):
        raise StudentError(f"{folder / _NAME} holds no JSON object, so {folder} is no student folder.")
    return index
