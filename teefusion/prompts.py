"""Prompt sets: normalise, deduplicate, split by content, store with digests. Files are read by ``prompt_files``.

    <folder>/train.jsonl, heldout.jsonl   one {"prompt": ..., "style": ...} a line, ordered by digest
    <folder>/manifest.json                written last; a folder without one is not a prompt set

A prompt's digest decides identity, split and order, so a set depends on which prompts there are, not on where they
stand, and adding prompts moves none from one side to the other.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
import unicodedata
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from teefusion.errors import IntegrityError, PromptError
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


def is_text(text: str) -> bool:
    """Whether every character is text: no control character but whitespace, and nothing that UTF-8 cannot spell."""
    return not _NOT_TEXT.search(text)


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
    if not is_text(text):
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
