"""How fast stored targets are read, beside a plain sequential read of the same files, and how much memory it takes.

    python benchmarks/shards.py [--gigabytes 1] [--repeat 20] [--rounds 3] [--workdir DIR] [--json]

``read_ratio`` is the stream's bytes a second, verified, shuffled and made into batches, over those of reading file by
file and doing nothing; once with the files dropped from the page cache before, once with them in it. In turns, medians.
``rss_growth_mb`` is how much more memory the stream held at its most over ``repeat`` times the set than over the set
once; the larger one repeats the files under other names, so that it fits on the disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

_SHAPE = (16, 64, 64)  # latents of 512 pixels
_ROWS = 128
_BATCH = 64


def make_set(folder: Path, gigabytes: float) -> Any:
    """Random states in shards of about 32 MiB; returns their manifest."""
    import torch

    from teefusion.manifests import Manifest, SplitRecord
    from teefusion.shards import write_tensors
    from teefusion.storage import FolderStore

    store, generator = FolderStore(folder), torch.Generator().manual_seed(0)
    one = _ROWS * 2 * 2 * 16 * 64 * 64
    records = []
    for k in range(max(1, round(gigabytes * 2**30 / one))):
        rows = {name: torch.randn(_ROWS, *_SHAPE, generator=generator).half() for name in ("x", "velocity")}
        rows |= {name: torch.rand(_ROWS, generator=generator) for name in ("sigma", "guidance", "guidance_gap")}
        rows |= {name: torch.zeros(_ROWS, dtype=torch.int64) for name in ("prompt", "trajectory", "step")}
        records.append(write_tensors(store, f"states/train-{k:05d}", rows))
    text = {"tokens": torch.zeros(1, 1, 8), "pooled": torch.zeros(1, 8)}
    split = SplitRecord(
        states=tuple(records), embeddings=(write_tensors(store, "embeddings/0", text),), prompts_per_block=1
    )
    return Manifest.model_construct(train=split, sigmas=(1.0, 0.0))


def repeated(folder: Path, manifest: Any, times: int) -> Any:
    """The manifest of a set ``times`` as large, whose further files are links to the first."""
    records = []
    for copy in range(times):
        for record in manifest.train.states:
            name = record.name if copy == 0 else f"{record.name}-{copy}"
            if copy:
                os.link(folder / f"{record.name}.safetensors", folder / f"{name}.safetensors")
            records.append(record.model_copy(update={"name": name}))
    return manifest.model_copy(update={"train": manifest.train.model_copy(update={"states": tuple(records)})})


def read_plainly(folder: Path, manifest: Any) -> int:
    """Every file once, in order; returns bytes."""
    return sum(len((folder / f"{record.name}.safetensors").read_bytes()) for record in manifest.train.states)


def read_stream(folder: Path, manifest: Any, shuffle_mb: int) -> int:
    """One epoch of batches; returns bytes."""
    from itertools import islice

    from teefusion.storage import FolderStore
    from teefusion.stream import StateStream

    stream = StateStream(FolderStore(folder), manifest, "train", shuffle_mb=shuffle_mb)
    count = stream.split.rows // _BATCH
    assert sum(len(states) for states in islice(stream.batches(batch_size=_BATCH, seed=0), count)) == count * _BATCH
    return sum(record.bytes for record in manifest.train.states)


def forget(folder: Path, manifest: Any) -> None:
    """Drop the files from the page cache."""
    for record in manifest.train.states:
        descriptor = os.open(folder / f"{record.name}.safetensors", os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All figures, each a median over the rounds with its least and greatest."""
    manifest = make_set(folder, options.gigabytes)
    ways: dict[str, Callable[[], int]] = {
        "plain": lambda: read_plainly(folder, manifest),
        "stream": lambda: read_stream(folder, manifest, options.shuffle_mb),
    }
    rates: dict[str, list[float]] = {f"{way}_{state}": [] for state in ("cold", "warm") for way in ways}
    for state in ("cold", "warm"):
        for _ in range(options.rounds):
            for way, read in ways.items():
                if state == "cold":
                    forget(folder, manifest)
                started = time.perf_counter()
                size = read()
                rates[f"{way}_{state}"].append(size / (time.perf_counter() - started) / 1e6)
    ratios = {
        state: [s / p for s, p in zip(rates[f"stream_{state}"], rates[f"plain_{state}"], strict=True)]
        for state in ("cold", "warm")
    }
    large = repeated(folder, manifest, options.repeat)
    small_mb = peak_mb(folder, manifest, options.shuffle_mb)
    large_mb = peak_mb(folder, large, options.shuffle_mb)
    return {
        "read_ratio": statistics.median(ratios["cold"]),
        "read_ratio_cached": statistics.median(ratios["warm"]),
        "rss_growth_mb": large_mb - small_mb,
        "rss_mb": {"once": small_mb, f"{options.repeat} times": large_mb},
        "gigabytes": sum(record.bytes for record in manifest.train.states) / 1e9,
        "shuffle_mb": options.shuffle_mb,
        "megabytes_per_second": {
            name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for name, values in rates.items()
        },
    }


def peak_mb(folder: Path, manifest: Any, shuffle_mb: int) -> float:
    """Largest resident memory (MB) of a process that streams an epoch and does nothing else."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak, folder, manifest, shuffle_mb).result()


def _peak(folder: Path, manifest: Any, shuffle_mb: int) -> float:
    import resource

    read_stream(folder, manifest, shuffle_mb)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of distinct data (default 1)")
    parser.add_argument("--repeat", type=int, default=20, help="size of the larger set, in times (default 20)")
    parser.add_argument("--rounds", type=int, default=3, help="default 3")
    parser.add_argument("--shuffle-mb", type=int, default=128, help="train.shuffle_mb (default 128)")
    parser.add_argument("--workdir", type=Path, help="folder on the disk to measure (default: the system's temporary)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.workdir:
        options.workdir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
        result = measure(options, Path(folder))
    if options.json:
        sys.stdout.write(json.dumps(result) + "\n")
        return
    for name, rate in result["megabytes_per_second"].items():
        sys.stdout.write(f"{name:12} {rate['median']:8.0f} MB/s ({rate['min']:.0f} to {rate['max']:.0f})\n")
    sys.stdout.write(f"ratio        {result['read_ratio']:8.2f} cold, {result['read_ratio_cached']:.2f} cached\n")
    sys.stdout.write(f"memory       {result['rss_growth_mb']:8.0f} MB more over {options.repeat} times the set\n")


if __name__ == "__main__":
    main()
