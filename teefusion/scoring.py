"""Scorers: how well a picture fits its prompt, from CLIP embeddings, in float32.

One class serves them all: the bundled arbiter and any transformers CLIP folder, HPS v2 (`hps.py`), CLIPScore and
PickScore. They differ in weights, in how a picture is prepared (`preprocessing.py`), and in what is made of the cosine.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from teefusion.errors import ScorerError
from teefusion.preprocessing import CLIP_MEAN, CLIP_STD, Preprocessing
from teefusion.scorer_names import Kind
from teefusion.scorer_sources import ScorerSource, find_scorer, read_json_object

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measure:
    """What is made of the cosine of two embeddings."""

    words: str
    of: Callable[[Tensor, Tensor], Tensor]
    """Of cosines [B] and the model's logit scale, the logarithm of a factor."""


_COSINE = Measure("100 * cosine(image, text), float32", lambda cosine_B, _: 100 * cosine_B)
_MEASURES: dict[Kind, Measure] = {
    "folder": _COSINE,
    "hps": _COSINE,
    # As torchmetrics has it; Hessel et al. (arXiv 2104.08718) multiply by 2.5.
    "clip": Measure("100 * max(cosine(image, text), 0), float32", lambda cosine_B, _: 100 * cosine_B.clamp(min=0)),
    "pickscore": Measure(
        "exp(logit_scale) * cosine(image, text), float32", lambda cosine_B, logit_scale: logit_scale.exp() * cosine_B
    ),
}


class Scorer(Protocol):
    """Scores pictures against prompts. Higher is better; scores of two scorers do not compare."""

    @property
    def name(self) -> str:
        """Short, for reports."""
        ...

    def describe(self) -> dict[str, Any]:
        """What determines the scores, JSON-ready: name, version, digest of the weights, preprocessing."""
        ...

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One finite score a pair. Raises ScorerError."""
        ...

    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Directions [B, D] of pictures in the scorer's image space, of length 1, float32 on the CPU."""
        ...

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts of which only a beginning is scored."""
        ...


class EmbeddingScorer:
    """A CLIP as scorer.

    Prompts longer than the text model's context are cut, as CLIP does; ``truncated_prompts`` holds them, and the first
    ones are logged.
    """

    def __init__(self, source: ScorerSource, *, device: str = "cpu", batch_size: int = 32) -> None:
        """Load the model, in float32. Raises ScorerError for weights that are damaged or incomplete."""
        self.name = source.name
        self.truncated_prompts: set[str] = set()
        self._source, self._device, self._batch_size = source, device, batch_size
        self._measure = _MEASURES[source.kind]
        self._clean = _cleaning(source.kind)[0]
        self._model = _load_model(source).to(device)
        self._tokenizer = _load_tokenizer(source, self._model)
        self._context = int(self._model.config.text_config.max_position_embeddings)
        self._prepare = _preprocessing(source, int(self._model.config.vision_config.image_size))

    def describe(self) -> dict[str, Any]:
        """What determines the scores, JSON-ready."""
        source = self._source
        return {
            "name": self.name,
            "kind": "clip" if source.kind == "folder" else source.kind,
            "version": source.version,
            "revision": source.revision,
            "score": self._measure.words,
            "weights_sha256": source.weights_sha256,
            "tokenizer_sha256": source.tokenizer_sha256,
            "context_tokens": self._context,
            "text": _cleaning(source.kind)[1],
            "preprocessing": self._prepare.describe(),
        }

    def score(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """One score a pair (``describe`` says what it is). Raises ScorerError for what cannot be scored."""
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
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Directions [B, D] of pictures in image space, of length 1. Raises ScorerError for what cannot be scored."""
        parts = []
        for start in range(0, len(images), self._batch_size):
            with _full_precision(self._device):
                image_BD = self._image_features(images[start : start + self._batch_size])
                parts.append((image_BD / image_BD.norm(dim=-1, keepdim=True)).cpu())
        return torch.cat(parts)

    def too_long(self, prompts: Sequence[str]) -> list[str]:
        """The prompts that are longer than the text model's context."""
        texts = [self._clean(prompt) for prompt in prompts]
        ids = self._tokenizer(texts, verbose=False)["input_ids"] if texts else []
        return [prompt for prompt, tokens in zip(prompts, ids, strict=True) if len(tokens) > self._context]

    def _image_features(self, images: Sequence[Image.Image]) -> Tensor:
        pixels_BCHW = torch.stack([self._prepare(image) for image in images]).to(self._device)
        features: Tensor = self._model.get_image_features(pixel_values=pixels_BCHW).pooler_output
        return features

    @torch.inference_mode()
    def _score_batch(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        tokens = self._tokens(prompts)
        with _full_precision(self._device):
            image_BD = self._image_features(images)
            text_BD = self._model.get_text_features(**tokens).pooler_output
            # Not F.cosine_similarity: it turns an all-zero embedding into a score of 0, which is no measurement.
            cosine_B = (image_BD * text_BD).sum(-1) / (image_BD.norm(dim=-1) * text_BD.norm(dim=-1))
            score_B = self._measure.of(cosine_B, self._model.logit_scale)
        return [float(score) for score in score_B.cpu()]

    def _tokens(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        texts = [self._clean(prompt) for prompt in prompts]
        tokens = self._tokenizer(
            texts, padding="max_length", truncation=True, max_length=self._context, return_tensors="pt"
        )
        full = tokens["attention_mask"][:, -1].tolist()  # only these may have been cut
        self._note_truncated(self.too_long([p for p, whole in zip(prompts, full, strict=True) if whole]), len(prompts))
        return {key: tokens[key].to(self._device) for key in ("input_ids", "attention_mask")}

    def _note_truncated(self, longer: Sequence[str], count: int) -> None:
        if longer and not self.truncated_prompts:
            log.warning(
                "%d of %d prompts are longer than the %d tokens that scorer %s reads; the rest of them is not scored. "
                "Said once.",
                *(len(longer), count, self._context, self.name),
            )
        self.truncated_prompts.update(longer)


class ClipScorer(EmbeddingScorer):
    """A transformers CLIP folder (safetensors) as scorer, with HPS v2's preprocessing."""

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
        super().__init__(find_scorer(str(folder), antialias=antialias), device=device, batch_size=batch_size)
        self.name = name or self.name


def load_scorer(scorer: str | ScorerSource, *, device: str) -> Scorer:
    """The scorer of that name (see ``EvaluateSettings.scorer``), or of files already found. Raises ScorerError."""
    source = find_scorer(scorer) if isinstance(scorer, str) else scorer
    return EmbeddingScorer(source, device=device)


def _cleaning(kind: Kind) -> tuple[Callable[[str], str], str]:
    """What is done to a prompt before the tokenizer sees it, and that in words."""
    from teefusion import hps

    return (hps.clean, hps.CLEANING) if kind == "hps" else (str, "as it is")


def _preprocessing(source: ScorerSource, size: int) -> Preprocessing:
    """As published for each kind; a folder's preprocessor_config.json may give other statistics."""
    mean, std = (CLIP_MEAN, CLIP_STD) if source.kind == "hps" else _normalisation(source.path)
    return Preprocessing(
        size=size,
        fit="crop" if source.kind in ("clip", "pickscore") else "pad",
        antialias=source.antialias,
        transparency=source.transparency,
        mean=mean,
        std=std,
    )


def _load_model(source: ScorerSource) -> Any:
    if source.kind == "hps":
        from teefusion.hps import load_hps

        return load_hps(source.path)
    return _load_folder(source.path)


def _load_folder(folder: Path) -> Any:
    """Model of a transformers CLIP folder."""
    from transformers import CLIPModel

    try:
        model, info = CLIPModel.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # transformers and safetensors raise many kinds for a damaged folder
        raise ScorerError(
            f"{folder} cannot be loaded as a scorer: {error} It needs config.json and model.safetensors as CLIPModel "
            "saves them, and a tokenizer as CLIPTokenizer does."
        ) from error
    # transformers fills what is missing with random numbers, and a scorer with random weights decides at random.
    if absent := sorted(info["missing_keys"]):
        raise ScorerError(
            f"{folder} is no complete CLIP: {len(absent)} weights are missing, the first is {absent[0]}. Fetch it "
            "again, or name another folder in evaluate.scorer."
        )
    return model.eval()


def _load_tokenizer(source: ScorerSource, model: Any) -> Any:
    """The tokenizer, once it is one of this model's vocabulary."""
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(source.tokenizer, local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise many kinds for a damaged folder
        raise ScorerError(
            f"{source.tokenizer} cannot be loaded as a scorer's tokenizer: {error} It needs the files that "
            "CLIPTokenizer saves."
        ) from error
    text = model.config.text_config
    if len(tokenizer) > text.vocab_size:
        raise ScorerError(
            f"{source.tokenizer}: its tokenizer has {len(tokenizer)} tokens, its text model {text.vocab_size}. They do "
            "not belong together: fetch the scorer again."
        )
    # The text is read off at the end token. Configs before transformers 4.31 say 2 and mean the largest id.
    expected = len(tokenizer) - 1 if text.eos_token_id == 2 else text.eos_token_id
    if tokenizer.eos_token_id != expected:
        raise ScorerError(
            f"{source.tokenizer}: its end token is number {tokenizer.eos_token_id}, the text model is read off at "
            f"{expected}. They do not belong together: use CLIP's own tokenizer (evaluate.tokenizer)."
        )
    return tokenizer


def _normalisation(folder: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation a channel, from preprocessor_config.json where there is one."""
    file = folder / "preprocessor_config.json"
    config = read_json_object(file) if file.is_file() else {}
    mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
    try:
        mean, std = tuple(float(value) for value in mean), tuple(float(value) for value in std)
    except (TypeError, ValueError):
        mean = std = ()
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ScorerError(f"{file}: image_mean and image_std must be 3 numbers each, image_std positive. Correct them.")
    return mean, std


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
