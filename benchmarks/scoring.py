"""Pictures scored a second beside a bare loop over the same model and batches, measured in turns.

    python benchmarks/scoring.py [--scorer bundled:shapes] [--pictures 256] [--side 64] [--batch 32] [--json]

The bare loop is what one would write: resize, normalise, tokenize, two forwards and a cosine, with no checks, digests
or records. Ours is the scorer that an evaluation uses. Both get the same decoded pictures. ``ratio_to_bare_loop`` is
ours over bare, above 0.9 where what surrounds the model costs less than a tenth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Rates of both over the rounds, the median ratio of neighbouring ones, and how far their scores are apart."""
    import numpy as np
    import torch
    from PIL import Image

    from teefusion.devices import resolve_device
    from teefusion.scorer_sources import find_scorer
    from teefusion.scoring import EmbeddingScorer

    device = resolve_device(options.device)
    scorer = EmbeddingScorer(find_scorer(options.scorer), device=device, batch_size=options.batch)
    rng = np.random.default_rng(0)
    shape = (options.pictures, options.side, options.side, 3)
    images = [Image.fromarray(pixels) for pixels in rng.integers(0, 256, shape, dtype=np.uint8)]
    prompts = [f"a photo of picture {k}" for k in range(options.pictures)]
    contestants: dict[str, Callable[[], list[float]]] = {
        "ours": lambda: scorer.score(images, prompts),
        "bare": lambda: bare_loop(scorer, images, prompts, device, options.batch),
    }
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    scores: dict[str, list[float]] = {}
    for round_number in range(options.rounds + 1):
        for name, score in contestants.items():
            started = time.perf_counter()
            scores[name] = score()  # ends with numbers on the CPU, so that nothing is left to wait for
            if round_number:  # the first pays for allocation
                rates[name].append(options.pictures / (time.perf_counter() - started))
    ratios = [ours / bare for ours, bare in zip(rates["ours"], rates["bare"], strict=True)]
    return {
        "ratio_to_bare_loop": statistics.median(ratios),
        "ratio_least": min(ratios),
        "ratio_greatest": max(ratios),
        "pictures_a_second": {name: statistics.median(values) for name, values in rates.items()},
        "largest_difference": max(abs(a - b) for a, b in zip(scores["ours"], scores["bare"], strict=True)),
        "scorer": options.scorer,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else "cpu",
        "threads": torch.get_num_threads(),
    }


def bare_loop(scorer: Any, images: list[Any], prompts: list[str], device: str, batch: int) -> list[float]:
    """Cosines times 100 by the scorer's own model and tokenizer, with HPS v2's preprocessing."""
    import numpy as np
    import torch
    import torch.nn.functional as F

    from teefusion.preprocessing import CLIP_MEAN, CLIP_STD

    model, tokenizer = scorer._model, scorer._tokenizer
    size, context = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings
    mean, std = (torch.tensor(values)[:, None, None] for values in (CLIP_MEAN, CLIP_STD))
    scores: list[float] = []
    for start in range(0, len(images), batch):
        pixels = []
        for image in images[start : start + batch]:
            picture = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)
            if picture.shape[-1] != size:
                picture = F.interpolate(picture[None], (size, size), mode="bicubic", antialias=True)[0]
            pixels.append((picture - mean) / std)
        tokens = tokenizer(
            prompts[start : start + batch],
            padding="max_length",
            truncation=True,
            max_length=context,
            return_tensors="pt",
        ).to(device)
        with torch.inference_mode():
            image = model.get_image_features(pixel_values=torch.stack(pixels).to(device)).pooler_output
            text = model.get_text_features(**tokens).pooler_output
            scores += (100 * F.cosine_similarity(image, text)).tolist()
    return scores


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--scorer", default="bundled:shapes", help="as evaluate.scorer (default bundled:shapes)")
    parser.add_argument("--device", default="auto", help="default auto")
    parser.add_argument("--pictures", type=int, default=256, help="default 256")
    parser.add_argument("--side", type=int, default=64, help="pixels, square pictures (default 64)")
    parser.add_argument("--batch", type=int, default=32, help="default 32")
    parser.add_argument("--rounds", type=int, default=7, help="default 7")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    result = measure(options)
    sys.stdout.write(json.dumps(result, indent=None if options.json else 2) + "\n")


if __name__ == "__main__":
    main()
