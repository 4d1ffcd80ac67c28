"""Drawings in memory: a pool of captioned pictures, the held-out scenes, and the tokenizer of their captions."""

from __future__ import annotations

import multiprocessing
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import CLIPTokenizer

from teefusion.shapes.drawings import Scene, all_scenes, draw

CONTEXT = 16
"""Tokens of a caption, with start and end."""
_HELDOUT_EVERY = 10
_WORD_END = "</w>"


@dataclass(frozen=True)
class Pool:
    """Pictures [N, 3, H, W] as bytes, and the scene of each."""

    pixels_NCHW: Tensor
    scenes: tuple[Scene, ...]

    def pictures(self, index_B: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in -1..1."""
        return self.pixels_NCHW[index_B].float() / 127.5 - 1


def split_scenes() -> tuple[list[Scene], list[Scene]]:
    """Scenes to train on, and every tenth one, which no training picture shows."""
    scenes = list(all_scenes())
    order = np.random.default_rng(0).permutation(len(scenes))
    heldout = {int(k) for k in order[::_HELDOUT_EVERY]}
    train = [scene for k, scene in enumerate(scenes) if k not in heldout]
    return train, [scenes[k] for k in sorted(heldout)]


def make_pool(scenes: list[Scene], count: int, seed: int) -> Pool:
    """``count`` drawings, going through the scenes again and again; picture k depends on (seed, k) alone."""
    chosen = [scenes[k % len(scenes)] for k in range(count)]
    with multiprocessing.get_context("fork").Pool() as workers:
        drawn = workers.starmap(_pixels, [(scene, seed, k) for k, scene in enumerate(chosen)], chunksize=256)
    return Pool(torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous(), tuple(chosen))


def _pixels(scene: Scene, seed: int, k: int) -> NDArray[np.uint8]:
    return np.asarray(draw(scene, np.random.default_rng((seed, k))))


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer: each word of a caption is one token, and any other text still has tokens."""
    words = Counter(word for scene in all_scenes() for word in scene.caption.split())
    merges = _learn_merges(words)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [
        "<|startoftext|>",
        "<|endoftext|>",
        *alphabet,
        *(letter + _WORD_END for letter in alphabet),
        *("".join(pair) for pair in merges),
    ]
    vocabulary = {token: k for k, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT)


def _learn_merges(words: Counter[str]) -> list[tuple[str, str]]:
    """Byte-pair encoding of ASCII words until each is one token: the most frequent pair first, ties by letter.

    The tokenizers library would learn them too, but it breaks ties by chance.
    """
    pieces = {word: (*word[:-1], word[-1] + _WORD_END) for word in words}
    merges: list[tuple[str, str]] = []
    while True:
        pairs = Counter[tuple[str, str]]()
        for word, parts in pieces.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        if not pairs:
            return merges
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        pieces = {word: _merge(parts, best) for word, parts in pieces.items()}


def _merge(parts: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    merged: list[str] = []
    for part in parts:
        if merged and (merged[-1], part) == pair:
            merged[-1] += part
        else:
            merged.append(part)
    return tuple(merged)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token ids [B, CONTEXT], padded and cut as the SD3 pipeline does."""
    return tokenizer(captions, padding="max_length", max_length=CONTEXT, truncation=True, return_tensors="pt").input_ids  # type: ignore[no-any-return]
