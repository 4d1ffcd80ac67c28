"""Scorers: how well a picture fits its prompt, as 100 * cosine of CLIP embeddings, in float32.

One class serves the bundled arbiter and HPS v2 (a ViT-H-14 in transformers' layout). Its preprocessing is HPS v2's,
written here without torchvision: RGB; longest side resized to the model's size, bicubic; zero-padded, centred, to a
square; normalised. Whether the resize antialiases changes HPS v2 scores, so it is a parameter and recorded.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from teefusion.errors import ScorerError
from teefusion.files import sha256_folder
from teefusion.shapes import SCORER_DIR

log = logging.getLogger(__name__)

BUNDLED = "bundled:shapes"
# OpenAI CLIP's, which HPS v2 uses too: open_clip/constants.py
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# 8 bits a channel; PIL would clip the deeper ones ("I;16", "F") to white without a word.
_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV"})


class Scorer(Protocol):
    """Scores pictures against prompts. Higher is better; scores of two scorers do not compare."""

    @property
    def name(self) -> str:
        """Short, for reports."""
        ...

    def describe(self) -> dict[str, Any]:
        """What determines the scores, JSON-ready: name, digest of the weights, preprocessing."""
        ...

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One finite score a pair. Raises ScorerError."""
        ...


class ClipScorer:
    """A transformers CLIP folder (safetensors) as scorer.

    Prompts longer than the text model's context are cut, as CLIP does; ``truncated_prompts`` holds them, and the first
    ones are logged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str | None = None,
        device: str = "cpu",
        antialias: bool = True,
        batch_size: int = 32,
    ) -> None:
        """Load the model. Raises ScorerError for a folder that is missing, no CLIP, or incomplete."""
        self.name = name or folder.name
        self.truncated_prompts: set[str] = set()
        self._device, self._antialias, self._batch_size = device, antialias, batch_size
        self._model, self._tokenizer = _load_clip(folder)
        self._model.to(device)
        self._image_size = int(self._model.config.vision_config.image_size)
        self._context = int(self._model.config.text_config.max_position_embeddings)
        self._mean, self._std = _normalisation(folder)
        self._digest = sha256_folder(folder)

    def describe(self) -> dict[str, Any]:
        """What determines the scores, JSON-ready."""
        return {
            "name": self.name,
            "kind": "clip",
            "score": "100 * cosine(image, text), float32",
            "weights_sha256": self._digest,
            "context_tokens": self._context,
            "preprocessing": {
                "transparency": "composited over white",
                "resize": f"longest side to {self._image_size}, bicubic",
                "antialias": self._antialias,
                "padding": "zeros, centred",
                "mean": list(self._mean),
                "std": list(self._std),
            },
        }

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """100 * cosine for each pair of picture and prompt. Raises ScorerError for what cannot be scored."""
        if len(images) != len(prompts):
            raise ScorerError(
                f"{len(images)} pictures cannot be paired with {len(prompts)} prompts: give one prompt a picture."
            )
        scores: list[float] = []
        for start in range(0, len(images), self._batch_size):
            chosen = slice(start, start + self._batch_size)
            scores += self._score_batch(images[chosen], prompts[chosen])
        for k, score in enumerate(scores):
            if not np.isfinite(score):
                raise ScorerError(
                    f"Scorer {self.name} gave {score} for picture {k} of {len(scores)}, prompt {prompts[k][:80]!r}. "
                    "Look at that picture; if it is fine, the scorer's weights are damaged: fetch them again."
                )
        return scores

    @torch.inference_mode()
    def _score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        pixels_BCHW = torch.stack([self._pixels(image) for image in images]).to(self._device)
        tokens = self._tokens(prompts)
        with _full_precision(self._device):
            image_BD = self._model.get_image_features(pixel_values=pixels_BCHW).pooler_output
            text_BD = self._model.get_text_features(**tokens).pooler_output
            # Not F.cosine_similarity: it turns an all-zero embedding into a score of 0, which is no measurement.
            cosine_B = (image_BD * text_BD).sum(-1) / (image_BD.norm(dim=-1) * text_BD.norm(dim=-1))
        return [float(score) for score in (100 * cosine_B).cpu()]

    def _pixels(self, image: Image.Image) -> Tensor:
        """CHW tensor, normalised."""
        pixels_CHW = resize_and_pad(_rgb(image), self._image_size, antialias=self._antialias)
        mean_C, std_C = torch.tensor(self._mean), torch.tensor(self._std)
        return (pixels_CHW - mean_C[:, None, None]) / std_C[:, None, None]

    def _tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=self._context, return_tensors="pt"
        )
        lengths = [len(ids) for ids in self._tokenizer(list(prompts), verbose=False)["input_ids"]]
        self._note_truncated([p for p, n in zip(prompts, lengths, strict=True) if n > self._context], len(prompts))
        return {key: tokens[key].to(self._device) for key in ("input_ids", "attention_mask")}

    def _note_truncated(self, longer: Sequence[str], count: int) -> None:
        if longer and not self.truncated_prompts:
            log.warning(
                "%d of %d prompts are longer than the %d tokens that scorer %s reads; the rest of them is not scored. "
                "Said once.",
                *(len(longer), count, self._context, self.name),
            )
        self.truncated_prompts.update(longer)


def load_scorer(uri: str, *, device: str) -> Scorer:
    """The scorer at ``uri``: ``bundled:shapes`` or a transformers CLIP folder. Raises ScorerError."""
    if uri == BUNDLED:
        return ClipScorer(SCORER_DIR, name=uri, device=device)
    if uri.startswith("bundled:"):
        raise ScorerError(
            f"There is no bundled scorer {uri!r}, only {BUNDLED!r}. Set evaluate.scorer to it or a folder."
        )
    return ClipScorer(Path(uri).expanduser(), device=device)


def resize_and_pad(pixels_CHW: Tensor, size: int, *, antialias: bool) -> Tensor:
    """Longest side to ``size`` (bicubic, not clamped), then zeros around it to a centred square."""
    height, width = pixels_CHW.shape[-2:]
    scale = size / max(height, width)
    new_height, new_width = (max(1, round(side * scale)) for side in (height, width))
    if scale != 1:
        pixels_CHW = F.interpolate(
            pixels_CHW[None], size=(new_height, new_width), mode="bicubic", align_corners=False, antialias=antialias
        )[0]
    top, left = (size - new_height) // 2, (size - new_width) // 2
    return F.pad(pixels_CHW, (left, size - new_width - left, top, size - new_height - top))


def _rgb(image: Image.Image) -> Tensor:
    """CHW tensor in [0, 1]. What is transparent shows white, as on a page."""
    if image.mode not in _MODES or not all(image.size):
        raise ScorerError(
            f"A picture of mode {image.mode!r} and {image.width}x{image.height} pixels cannot be scored: pictures have "
            "8 bits a channel and at least one pixel. Convert it to RGB first."
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    pixels_HWC = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1)


def _load_clip(folder: Path) -> tuple[Any, Any]:
    """Model and tokenizer of a transformers CLIP folder."""
    from transformers import CLIPModel, CLIPTokenizer

    _check_folder(folder)
    try:
        model, info = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers, tokenizers and safetensors raise many kinds for a damaged folder
        raise ScorerError(
            f"{folder} cannot be loaded as a scorer: {error} It needs config.json, model.safetensors and a tokenizer, "
            "as CLIPModel and CLIPTokenizer save them."
        ) from error
    # transformers fills what is missing with random numbers, and a scorer with random weights decides at random.
    if absent := sorted(info["missing_keys"]):
        raise ScorerError(
            f"{folder} is no complete CLIP: {len(absent)} weights are missing, the first is {absent[0]}. Fetch it "
            "again, or name another folder in evaluate.scorer."
        )
    vocabulary = model.config.text_config.vocab_size
    if len(tokenizer) > vocabulary:
        raise ScorerError(
            f"{folder}: its tokenizer has {len(tokenizer)} tokens, its text model {vocabulary}. They do not belong "
            "together: fetch the scorer again."
        )
    return model.eval(), tokenizer


def _check_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise ScorerError(
            f"{folder} is no scorer: config.json is missing. Set evaluate.scorer to {BUNDLED!r} or to a folder with a "
            "CLIPModel and its tokenizer in transformers' layout."
        )
    kind = _read_json_object(config).get("model_type")
    if kind != "clip":
        raise ScorerError(
            f"{folder} holds a model of type {kind!r}, and scorers are of type 'clip'. Name a CLIP folder in "
            "evaluate.scorer."
        )
    # Without these files transformers makes an empty tokenizer, to which all prompts are the same.
    if not (folder / "tokenizer.json").is_file() and not (folder / "vocab.json").is_file():
        raise ScorerError(
            f"{folder} has no tokenizer (tokenizer.json, or vocab.json and merges.txt). Save the CLIPTokenizer beside "
            "the model."
        )


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel, from preprocessor_config.json where there is one."""
    file = folder / "preprocessor_config.json"
    config = _read_json_object(file) if file.is_file() else {}
    mean, std = config.get("image_mean", _CLIP_MEAN), config.get("image_std", _CLIP_STD)
    try:
        mean, std = tuple(float(value) for value in mean), tuple(float(value) for value in std)
    except (TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ScorerError(f"{file}: image_mean and image_std must be 3 numbers each, image_std positive. Correct them.")
    return mean, std


def _read_json_object(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ScorerError(f"{file} cannot be read: {error}. Fetch the scorer again.") from error
    if not isinstance(value, dict):
        raise ScorerError(f"{file} holds no JSON object. Fetch the scorer again.")
    return value


@contextlib.contextmanager
def _full_precision(device: str) -> Iterator[None]:
    """Float32 arithmetic whatever the caller chose: no autocast, no TF32 in matrix products or convolutions."""
    products: Any = torch.backends.cuda.matmul
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]  # made at run time; "tf32" by default
    before = products.fp32_precision, convolutions.fp32_precision
    products.fp32_precision = convolutions.fp32_precision = "ieee"
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        products.fp32_precision, convolutions.fp32_precision = before
