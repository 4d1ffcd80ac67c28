"""Prompts from files of any common format, as they stand there. Reading streams, except for .json, parsed whole."""

from __future__ import annotations

import codecs
import csv
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from teefusion.errors import PromptError, StorageError
from teefusion.files import content_key, sha256_file
from teefusion.prompts import HPS_STYLES, UNSTYLED, Prompt, is_text, normalise

_MAX_LINE_BYTES = 64 << 10
_MAX_JSON_BYTES = 256 << 20
_MAX_ROW_GROUP_BYTES = 512 << 20
_MAX_STYLE_CHARS = 64
_RESERVED_STYLE = "overall"  # stands beside the styles in scores, verdict and report


def source_digest(path: Path) -> str:
    """Hex sha256 of a source: its bytes, and what its name says about reading them. Raises PromptError."""
    files = _source_files(path)
    try:
        return content_key([[f.suffix.lower(), _default_style(f), sha256_file(f)] for f in files], length=64)
    except StorageError as error:
        raise PromptError(f"{error} Or give another prompt source.") from error


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Stream the prompts of a file (.txt, .jsonl, .json, .csv, .parquet) or of a folder with HPS's four .json files.

    They come as they stand there, not yet normalised. Raises PromptError: at once for a path that cannot be a source,
    while iterating for what its content gets wrong.
    """
    return _read(path, _source_files(path))


def _source_files(path: Path) -> list[Path]:
    try:
        files = [path / f"{style}.json" for style in HPS_STYLES] if path.is_dir() else [path]
        for file in files:
            _check_file(file)
    except FileNotFoundError as error:
        if path.is_dir():
            missing = [file.name for file in files if not file.exists()]
            raise PromptError(
                f"Folder {path} lacks {', '.join(missing)}: a prompt folder holds HPS's {len(HPS_STYLES)} lists "
                f"({', '.join(file.name for file in files)}). Add what is missing, or give one prompt file."
            ) from error
        raise PromptError(f"Prompt file {path} does not exist. Check the path given as --prompts.") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    return files


def _check_file(path: Path) -> None:
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise PromptError(f"{path} is no regular file, so it cannot be read twice. Save the prompts to a file first.")
    if path.suffix.lower() not in _READERS:
        raise PromptError(f"{path} has an unknown suffix ({path.suffix or 'none'}). Use one of {', '.join(_READERS)}.")
    if status.st_size == 0:
        raise PromptError(f"{path} is empty (0 bytes). Write prompts into it, or give another file.")


def _read(path: Path, files: list[Path]) -> Iterator[Prompt]:
    found = False
    for file in files:
        try:
            for prompt in _READERS[file.suffix.lower()](file):
                found = True
                yield prompt
        except OSError as error:
            raise _unreadable(file, error) from error
    if not found:
        raise PromptError(f"{path} holds no prompt. Write prompts into it, or give another file.")


def _read_txt(path: Path) -> Iterator[Prompt]:
    for _, line in _lines(path):
        yield Prompt(line.rstrip("\r\n"))


def _read_jsonl(path: Path) -> Iterator[Prompt]:
    for number, line in _lines(path):
        if line.strip():
            where = f"{path}, line {number}"
            yield _from_json(_parse(line.strip(), path, line=number), where, UNSTYLED)


def _read_json(path: Path) -> Iterator[Prompt]:
    if path.stat().st_size > _MAX_JSON_BYTES:
        raise PromptError(
            f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB, and a .json file is parsed whole. Convert it to "
            ".jsonl (one object a line), which is streamed."
        )
    values = _parse(_decode(path.read_bytes(), path), path)
    if not isinstance(values, list):
        raise PromptError(f"{path} holds a JSON {_json_type(values)}. Make it a list of prompts.")
    for number, value in enumerate(values, 1):
        yield _from_json(value, f"{path}, item {number}", _default_style(path))


def _read_csv(path: Path) -> Iterator[Prompt]:
    rows = csv.reader((line for _, line in _lines(path)), strict=True)
    try:
        header = [name.strip() for name in next(rows, [])]
        _require_prompt_column(path, header)
        text, style = header.index("prompt"), header.index("style") if "style" in header else None
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if row and len(row) != len(header):
                raise PromptError(
                    f"{where} has {len(row)} fields, the header {len(header)}. Put prompts that hold commas in quotes."
                )
            if row:
                yield Prompt(row[text], _style(None if style is None else row[style], where, UNSTYLED))
    except csv.Error as error:
        raise PromptError(f"{path}, line {rows.line_num} is not valid CSV: {error}. Check its quotes.") from error


def _read_parquet(path: Path) -> Iterator[Prompt]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        advice = "Install it (pip install 'teefusion[train]'), or convert the file to .jsonl"
        raise PromptError(f"{path}: reading .parquet takes pyarrow, which is not installed. {advice}.") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = [name for name in ("prompt", "style") if name in table.schema_arrow.names]
            _require_prompt_column(path, table.schema_arrow.names)
            _require_small_row_groups(path, table.metadata)
            row = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                for value in batch.to_pylist():
                    row += 1
                    # A table's missing value is an empty prompt, dropped and counted like a blank line.
                    value["prompt"] = "" if value["prompt"] is None else value["prompt"]
                    yield _from_json(value, f"{path}, row {row}", UNSTYLED)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        found = normalise(str(error)).rstrip(".")  # pyarrow's messages run over lines
        raise PromptError(f"{path} is not readable as parquet: {found}. Write it again, or use .jsonl.") from error


def _require_small_row_groups(path: Path, metadata: Any) -> None:
    """Only a whole row group can be read, so one of them bounds the memory."""
    for k in range(metadata.num_row_groups):
        group = metadata.row_group(k)
        parts = (group.column(j) for j in range(group.num_columns))
        size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema in ("prompt", "style"))
        if size > _MAX_ROW_GROUP_BYTES:
            raise PromptError(
                f"{path}: row group {k} has {size >> 20:,} MiB of prompts, more than {_MAX_ROW_GROUP_BYTES >> 20:,}. "
                "Write the file with smaller ones (row_group_size=100_000)."
            )


def _require_prompt_column(path: Path, columns: list[str]) -> None:
    if "prompt" not in columns:
        names = ", ".join(map(repr, columns))[:200] or "none"
        raise PromptError(f"{path} has no column 'prompt' (its columns: {names}). Name the column with the texts so.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their line breaks, of which at most one is in memory, and no longer than allowed."""
    offset = 0
    with path.open("rb") as stream:
        number = 0
        while data := stream.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(data) > _MAX_LINE_BYTES:
                raise PromptError(
                    f"{path}, line {number} (from byte {offset}) is longer than {_MAX_LINE_BYTES >> 10} KiB, so it is "
                    "no prompt. Give a text file with one prompt a line, broken by line feeds."
                )
            yield number, _decode(data, path, line=number, offset=offset)
            offset += len(data)


def _decode(data: bytes, path: Path, *, line: int = 1, offset: int = 0) -> str:
    """Text of bytes that begin at ``line`` and ``offset`` of a file. A byte order mark at its start is accepted."""
    bom = len(codecs.BOM_UTF8) if offset == 0 and data.startswith(codecs.BOM_UTF8) else 0
    bad, found = data.find(b"\0"), "a NUL byte: this is binary data or UTF-16, not UTF-8 text"
    if bad < 0:
        try:
            return data[bom:].decode()
        except UnicodeDecodeError as error:
            bad, found = bom + error.start, f"byte 0x{data[bom + error.start]:02x}, which is not UTF-8"
    line += data.count(b"\n", 0, bad)
    raise PromptError(f"{path}, line {line} (byte {offset + bad}) holds {found}. Save the prompts as UTF-8 text.")


def _parse(text: str, path: Path, *, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise PromptError(
            f"{path}, line {line + error.lineno - 1}, column {error.colno} is not valid JSON: {error.msg}. Correct it; "
            "a .jsonl file has one string or object a line, a .json file is one list of them."
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise PromptError(
            f"{path}, from line {line} on, holds JSON that is no prompt: {error}. Give strings or objects."
        ) from error


def _from_json(value: Any, where: str, default_style: str) -> Prompt:
    if isinstance(value, str):
        return Prompt(value, default_style)
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        found = f"'prompt' is {_json_type(value.get('prompt'))}" if isinstance(value, dict) else _json_type(value)
        raise PromptError(f"{where}: {found}. Write a string, or an object whose 'prompt' is a string.")
    return Prompt(value["prompt"], _style(value.get("style"), where, default_style))


def _style(value: Any, where: str, default: str) -> str:
    if value is None or value == "":
        return default
    if isinstance(value, str) and len(value) <= _MAX_STYLE_CHARS:
        name = normalise(value)
        if name != _RESERVED_STYLE and is_text(name):
            return value
    raise PromptError(
        f"{where}: style {str(value)[:80]!r} cannot be used. Name it with a string of at most {_MAX_STYLE_CHARS} "
        f"characters, and not {_RESERVED_STYLE!r}, which stands for all styles together."
    )


def _default_style(path: Path) -> str:
    return path.stem if path.suffix.lower() == ".json" and path.stem in HPS_STYLES else UNSTYLED


def _json_type(value: Any) -> str:
    names = {
        "dict": "object",
        "str": "string",
        "bool": "boolean",
        "NoneType": "null",
        "int": "number",
        "float": "number",
    }
    return names.get(type(value).__name__, type(value).__name__)


def _unreadable(path: Path, error: OSError) -> PromptError:
    return PromptError(
        f"Cannot read {path}: {error.strerror or error}. Check its mode and owner, or give another file."
    )


_READERS: dict[str, Callable[[Path], Iterator[Prompt]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
