"""The format of stored targets: safetensors shards, prompt embeddings stored once a prompt, one manifest.

    <set>/manifest.json                         written last; a folder or prefix without one is not a target set
    <set>/plan.json                             what the set will be; written first
    <set>/states/{train,heldout}-00000.safetensors      rows of states
    <set>/embeddings/{train,heldout}-00000.safetensors  tokens and pooled text of a block of prompts
    <set>/embeddings/null.safetensors                   the empty prompt's

A row is one state of one trajectory: ``x`` and ``velocity`` [C, H, W], ``sigma``, ``step``, ``guidance`` (s),
``guidance_gap`` (mean squared difference of the target and the conditional velocity), ``trajectory`` and ``prompt``
(its index in the split's prompts). Beside each file lies its record (rows, bytes, sha256), written after it: a file
without a fitting record is not trusted.
"""

from __future__ import annotations

import hashlib
import json
import math
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch
from pydantic import ValidationError
from safetensors.torch import save as save_tensors
from torch import Tensor

from teefusion.errors import IntegrityError, NotFoundError
from teefusion.files import json_bytes
from teefusion.manifests import FileRecord
from teefusion.storage import Reader, Store

_DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
}
_READERS = 16  # of records, which are small: the store's delay is what they take
_ADVICE = "Run 'teefusion targets verify --repair' with the settings that made it: it makes the bad files anew."


def write_tensors(store: Store, name: str, tensors: dict[str, Tensor], *, forwards: int = 0) -> FileRecord:
    """Publish a file and then its record. Raises StorageError."""
    data = save_tensors({key: value.contiguous() for key, value in tensors.items()})
    store.write(tensor_file(name), data)
    record = FileRecord(
        name=name,
        rows=len(next(iter(tensors.values()))),
        bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(),
        forwards=forwards,
    )
    store.write(record_file(name), json_bytes(record.model_dump()))
    return record


def finished(store: Store, name: str) -> FileRecord | None:
    """The record of a file that was published whole, or none: then write it again.

    The file's size is compared, its content is not: every reader does that, and ``teefusion targets verify``.
    """
    record = _record(store, name)
    return record if record and store.size(tensor_file(name)) == record.bytes else None


def all_finished(store: Store, names: Sequence[str]) -> dict[str, FileRecord]:
    """Those of many files that ``finished`` would give: by listings, and a request for each that is there."""
    folders = {name.rpartition("/")[0] for name in names}
    sizes = {name: size for folder in folders for name, size in store.sizes(f"{folder}/").items()}
    there = [name for name in names if tensor_file(name) in sizes and record_file(name) in sizes]
    with ThreadPoolExecutor(_READERS) as readers:
        records = readers.map(lambda name: _record(store, name), there)
        pairs = zip(there, records, strict=True)
        return {name: record for name, record in pairs if record and record.bytes == sizes[tensor_file(name)]}


def _record(store: Store, name: str) -> FileRecord | None:
    try:
        record = FileRecord.model_validate(json.loads(store.read(record_file(name))))
    except (NotFoundError, ValueError, ValidationError):
        return None
    return record if record.name == name else None


def read_verified(store: Reader, record: FileRecord) -> memoryview:
    """The file's bytes, once size and sha256 are what the record says. Raises IntegrityError otherwise."""
    file = tensor_file(record.name)
    try:
        data = store.read_large(file)
        damage = _damage(data, record)
        if damage and store.forget(file):  # only a copy was damaged, it may be
            data = store.read_large(file)
            damage = _damage(data, record)
    except NotFoundError as error:
        raise IntegrityError(f"{store.where(file)} is missing. {_ADVICE}") from error
    if damage:
        raise IntegrityError(f"{store.where(file)} {damage}. {_ADVICE}")
    return data


def read_tensors(store: Reader, record: FileRecord) -> dict[str, Tensor]:
    """A file's tensors, verified first; not to be written to. Raises IntegrityError."""
    return _view(read_verified(store, record))


def _view(data: memoryview) -> dict[str, Tensor]:
    """The tensors of a safetensors file, as views of its bytes.

    safetensors' own ``load`` copies them, which takes as long as reading or hashing them does (benchmarks/shards.py).
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(bytes(data[8 : 8 + length]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, count = 8 + length + entry["data_offsets"][0], math.prod(entry["shape"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the bytes are read-only
            flat = torch.frombuffer(data, dtype=_DTYPES[entry["dtype"]], count=count, offset=start)
        tensors[name] = flat.view(entry["shape"])
    return tensors


def _damage(data: memoryview, record: FileRecord) -> str:
    """What is wrong with a file's content, empty where nothing is."""
    if len(data) != record.bytes:
        return f"has {len(data)} bytes, the manifest says {record.bytes}"
    digest = hashlib.sha256(data).hexdigest()
    if digest != record.sha256:
        return f"is corrupt: sha256 {digest[:12]}, the manifest says {record.sha256[:12]}"
    return ""


def tensor_file(name: str) -> str:
    """Name of the object that holds the tensors."""
    return f"{name}.safetensors"


def record_file(name: str) -> str:
    """Name of the object that holds their record."""
    return f"{name}.json"
