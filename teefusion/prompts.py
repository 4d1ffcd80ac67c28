"""Prompt sets: read any common format, normalise, deduplicate, split by content, store with digests.

    <folder>/train.jsonl, heldout.jsonl   one {"prompt": ..., "style": ...} a line, ordered by digest
    <folder>/manifest.json                written last; a folder without one is not a prompt set

A prompt's digest decides identity, split and order, so a set depends on which prompts there are, not on where they
stand, and adding prompts moves none from one side to the other. Reading streams, except for .json, which has to be
parsed whole.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
import stat
import sys
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from teefusion.errors import IntegrityError, PromptError, StorageError
from teefusion.files import (
    canonical_json,
    content_key,
    read_json,
    sha256_file,
    storage_error,
    write_bytes,
    write_json,
)

SCHEMA_VERSION = 1
HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
UNSTYLED = "unstyled"

DropReason = Literal["duplicate", "empty", "not_text", "too_long"]

_MANIFEST = "manifest.json"
_MAX_LINE_BYTES = 64 << 10
_MAX_JSON_BYTES = 256 << 20
_MAX_ROW_GROUP_BYTES = 512 << 20
_MAX_STYLE_CHARS = 64
_RESERVED_STYLE = "overall"  # stands beside the styles in scores, verdict and report
_LONGEST_DECOMPOSITION = 4  # code points that NFC may join into one, as in U+1F82
# Control characters that are no whitespace, and halves of surrogate pairs, which UTF-8 cannot spell.
_NOT_TEXT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text to draw, and the group it is reported under."""

    text: str
    style: str = UNSTYLED

    @property
    def digest(self) -> str:
        """Identity: hex sha256 of the case-folded NFC text. The style is no part of it."""
        return _digest(self.text).hex()


@dataclass(frozen=True)
class PromptSet:
    """Normalised prompts of both splits in digest order, and what became of the others."""

    train: tuple[Prompt, ...]
    heldout: tuple[Prompt, ...]
    dropped: dict[str, int]
    read: int

    @cached_property
    def sha256(self) -> str:
        """Name of the content: texts, styles and split, but not what was dropped."""
        return _set_digest([hashlib.sha256(_to_jsonl(split)).hexdigest() for split in (self.train, self.heldout)])


def normalise(text: str) -> str:
    """Unicode NFC, trimmed, every run of whitespace (line breaks too) one space: tokenizers see no difference."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def build_prompt_set(prompts: Iterable[Prompt], *, heldout_fraction: float, max_chars: int) -> PromptSet:
    """Normalise, drop and count what cannot be used, split by content hash.

    Of duplicates (equal but for case) the first stays, with its style. Raises PromptError if a split ends empty.
    """
    kept: dict[bytes, Prompt] = {}
    dropped: Counter[str] = Counter()
    read = 0
    for prompt in prompts:
        read += 1
        text = " ".join(prompt.text.split())
        if len(text) > _LONGEST_DECOMPOSITION * max_chars:
            # Normalising takes quadratic time on a run of combining marks, and could not make this one short enough.
            dropped["too_long"] += 1
            continue
        text = normalise(text)
        if reason := _unusable(text, max_chars):
            dropped[reason] += 1
        elif (digest := _digest(text)) in kept:
            dropped["duplicate"] += 1
        else:
            kept[digest] = Prompt(text, sys.intern(normalise(prompt.style) or UNSTYLED))
    # Held out is what lies below a threshold, so in digest order it comes first.
    digests = sorted(kept)
    border = bisect_left(digests, heldout_fraction, key=_position)
    ordered = tuple(kept[digest] for digest in digests)
    result = PromptSet(ordered[border:], ordered[:border], dict(sorted(dropped.items())), read)
    if not (result.train and result.heldout):
        raise PromptError(_explain_empty(result, heldout_fraction, max_chars))
    return result


def _unusable(text: str, max_chars: int) -> DropReason | None:
    if not text:
        return "empty"
    if _NOT_TEXT.search(text):
        return "not_text"
    return "too_long" if len(text) > max_chars else None


def _digest(text: str) -> bytes:
    # An unpaired surrogate is dropped before it counts, but a raw prompt may hold one, and has a digest too.
    return hashlib.sha256(unicodedata.normalize("NFC", text).casefold().encode("utf-8", "surrogatepass")).digest()


def _position(digest: bytes) -> float:
    """Where a prompt lies in [0, 1), evenly spread and for good."""
    return int.from_bytes(digest[:8], "big") / 2**64


def _explain_empty(prompts: PromptSet, heldout_fraction: float, max_chars: int) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in prompts.dropped.items())
    counts = f"{prompts.read:,} read, {sum(prompts.dropped.values()):,} dropped" + (f" ({reasons})" if reasons else "")
    if not (prompts.train or prompts.heldout):
        advice = "Give a source with at least a few dozen prompts"
        longer = f", or raise prompts.max_chars ({max_chars:,})" if "too_long" in prompts.dropped else ""
        return f"No usable prompt: {counts}. {advice}{longer}."
    name, change = ("training", "lower") if prompts.heldout else ("held-out", "raise")
    return (
        f"No {name} prompt: {counts}, {len(prompts.train):,} for training and {len(prompts.heldout):,} held out, by "
        f"content hash (prompts.heldout_fraction {heldout_fraction:g}). Add prompts, or {change} that fraction."
    )


class _File(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: int
    sha256: str


class _Manifest(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    schema_version: int
    prompt_set: str
    read: int
    dropped: dict[DropReason, int]
    train: _File
    heldout: _File


def write_prompt_set(folder: Path, prompts: PromptSet) -> None:
    """Store a set; the manifest comes last and makes the folder one. Raises StorageError."""
    files = {}
    for split, members in {"train": prompts.train, "heldout": prompts.heldout}.items():
        data = _to_jsonl(members)
        write_bytes(folder / f"{split}.jsonl", data)
        files[split] = {"prompts": len(members), "sha256": hashlib.sha256(data).hexdigest()}
    counts = {"read": prompts.read, "dropped": prompts.dropped}
    write_json(folder / _MANIFEST, {"schema_version": SCHEMA_VERSION, "prompt_set": prompts.sha256} | counts | files)


def load_prompt_set(folder: Path) -> PromptSet:
    """Read a stored set, every byte verified. Raises IntegrityError, and StorageError if a file cannot be read."""
    manifest = _load_manifest(folder)
    train = _load_split(folder / "train.jsonl", manifest.train)
    heldout = _load_split(folder / "heldout.jsonl", manifest.heldout)
    return PromptSet(train, heldout, {str(reason): n for reason, n in manifest.dropped.items()}, manifest.read)


def _load_manifest(folder: Path) -> _Manifest:
    path = folder / _MANIFEST
    if not path.is_file():
        raise IntegrityError(f"{folder} is no finished prompt set: {_MANIFEST} is missing. Run 'teefusion ingest'.")
    try:
        values = read_json(path)
    except IntegrityError as error:
        raise _damaged(path, "it is not valid JSON") from error
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != SCHEMA_VERSION:
        raise _damaged(path, f"it has schema version {version}, this program reads {SCHEMA_VERSION}")
    try:
        manifest = _Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if manifest.prompt_set != _set_digest([manifest.train.sha256, manifest.heldout.sha256]):
        raise _damaged(path, "prompt_set is not the digest of its files")
    if manifest.read != manifest.train.prompts + manifest.heldout.prompts + sum(manifest.dropped.values()):
        raise _damaged(path, "prompts kept and dropped do not add up to those read")
    return manifest


def _load_split(path: Path, record: _File) -> tuple[Prompt, ...]:
    if not path.is_file():
        raise _damaged(path, "it is missing")
    if (found := sha256_file(path)) != record.sha256:
        raise _damaged(path, f"sha256 is {found[:16]}..., the manifest says {record.sha256[:16]}...")
    try:
        with path.open("rb") as stream:
            values = (json.loads(line) for line in stream)
            prompts = tuple(Prompt(value["prompt"], sys.intern(value["style"])) for value in values)
    except OSError as error:
        raise storage_error(error, path, "read") from error
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, "a line is no prompt") from error
    if len(prompts) != record.prompts:
        raise _damaged(path, f"it holds {len(prompts)} prompts, the manifest says {record.prompts}")
    return prompts


def _damaged(path: Path, found: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is not what 'teefusion ingest' wrote: {found}. Delete {path.parent} and run 'teefusion ingest' again."
    )


def _to_jsonl(prompts: Iterable[Prompt]) -> bytes:
    lines = io.BytesIO()
    for prompt in prompts:
        lines.write(canonical_json({"prompt": prompt.text, "style": prompt.style}).encode() + b"\n")
    return lines.getvalue()


def _set_digest(files: list[str]) -> str:
    return content_key(files, length=64)


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
        if name != _RESERVED_STYLE and not _NOT_TEXT.search(name):
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
