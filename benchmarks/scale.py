"""What target sets of the published teachers take, from twenty thousand to ten million prompts: docs/scale.md's tables.

    python benchmarks/scale.py [--device H200] [--utilisation 0.4] [--table teachers|sets|pieces|all]

Nothing is measured here: it is the arithmetic of ``teefusion.estimates`` over the presets, in Markdown.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from typing import Any

TEACHERS = ("sd3-medium", "sd3.5-medium", "sd3.5-large", "flux.1-schnell")
STRATEGIES = ("euler_cfg", "w2sd")
PROMPTS = (20_000, 1_000_000, 10_000_000)


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A table, numbers to the right."""
    names = list(header)
    lines = [f"| {' | '.join(names)} |", "| --- |" + " ---: |" * (len(names) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def tables(device: str, utilisation: float | None) -> dict[str, str]:
    """The tables by name."""
    from teefusion.architectures import teacher_shape
    from teefusion.estimates import estimate_targets
    from teefusion.settings import load_settings

    shapes = {name: teacher_shape(load_settings(overrides={"teacher.name": name}).teacher) for name in TEACHERS}

    def estimate(teacher: str, strategy: str, prompts: int) -> Any:
        overrides = {"teacher.name": teacher, "strategy.name": strategy, "targets.trajectories": prompts}
        settings = load_settings(overrides=overrides)
        return estimate_targets(settings, device, utilisation=utilisation, shape=shapes[teacher])

    largest = {name: estimate(name, "euler_cfg", PROMPTS[-1]) for name in TEACHERS}
    return {
        "teachers": markdown(
            ("teacher", "parameters", "weights", "text tokens", "FLOPs a forward"),
            (
                (
                    name,
                    f"{e.parameters / 1e9:.2f} B",
                    _size(e.weights_bytes),
                    str(e.text_tokens),
                    f"{e.forward_flops:.3g}",
                )
                for name, e in largest.items()
            ),
        ),
        "sets": markdown(
            ("teacher", "strategy", "prompts", "forwards", "FLOPs", "GPU hours", "states", "embeddings", "files"),
            (
                _set_row(estimate(name, way, count), count)
                for name in TEACHERS
                for way in STRATEGIES
                for count in PROMPTS
            ),
        ),
        "pieces": markdown(
            ("teacher", "one state", "shard of states", "window of shards", "one prompt", "block of prompts"),
            (_piece_row(name, e) for name, e in largest.items()),
        ),
    }


def _set_row(e: Any, prompts: int) -> tuple[str, ...]:
    hours = f"{e.gpu_hours:,.0f}"
    sizes = (_size(e.states_bytes), _size(e.embeddings_bytes))
    return (e.teacher, e.strategy, f"{prompts:,}", f"{e.forwards:,}", f"{e.flops:.3g}", hours, *sizes, f"{e.files:,}")


def _piece_row(name: str, e: Any) -> tuple[str, ...]:
    """Sizes that reading and training meet, a file's header left out."""
    from teefusion.settings import load_settings

    settings = load_settings(overrides={"teacher.name": name})
    targets, window = settings.targets, settings.train.shuffle_mb * 2**20
    state, prompt = e.states_bytes / e.states, e.embeddings_bytes / (e.prompts + 1)
    shard = state * targets.states_per_trajectory * targets.shard_trajectories
    block = prompt * targets.shard_trajectories
    return (name, *(_size(round(value)) for value in (state, shard, window // shard * shard, prompt, block)))


def _size(count: int) -> str:
    from teefusion.files import readable_bytes

    return readable_bytes(count)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="H200", help="as in teefusion.estimates (default H200)")
    parser.add_argument("--utilisation", type=float, help="share of the peak (default: the assumed one)")
    parser.add_argument("--table", default="all", choices=["teachers", "sets", "pieces", "all"])
    options = parser.parse_args()
    made = tables(options.device, options.utilisation)
    chosen = made.values() if options.table == "all" else [made[options.table]]
    sys.stdout.write("\n".join(chosen))


if __name__ == "__main__":
    main()
