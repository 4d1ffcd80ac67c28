"""Student pipelines for diffusers users: ``pipe(prompt, guidance_scale=s)`` makes one transformer call a step.

``StudentPipeline.from_pretrained(folder)`` loads a student of any family, as the subclass of the family's stock
pipeline that it is.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, FluxPipeline, StableDiffusion3Pipeline
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from teefusion.errors import StudentError
from teefusion.fusion import SCALE_EMBEDDER, FusedConditioning, fuse, fusion_from_config, make_fusion, pack
from teefusion.loading import load_models
from teefusion.published import is_published, published_parts

log = logging.getLogger(__name__)

_HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only")


class StudentPipeline(DiffusionPipeline):
    """What the students of all families share: guidance is in the conditioning, not in a second forward.

    A student is called as its stock pipeline is. ``guidance_scale`` is diffusers' s, as everywhere, or a sequence of
    them, one a picture. Negative prompts are refused, since a student learned the direction away from the empty prompt
    and no other.
    """

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *, rounded: bool = False, **kwargs: Any) -> Any:
        """See DiffusionPipeline. Beside that, refuses incomplete weights, and reads those that a guidance MLP adds.

        A folder in the format of the authors' release loads too; ``rounded`` then repeats their rounding of the
        guidance to bfloat16. Raises StudentError for a folder that is no student.
        """
        source = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in _HUB_OPTIONS if name in kwargs}
        index = dict(cls.load_config(source, **hub))
        dtype = kwargs.get("dtype", torch.float32)
        if is_published(source, index, **hub):
            fusion = make_fusion("published").model_copy(update={"rounded": rounded})
            parts = published_parts(source, index, dtype=dtype, **hub)
            return TeEFusionSD3Pipeline(**parts, fusion=fusion.model_dump())
        kind = _CLASSES.get(index.get("_class_name", ""))
        if kind is None or not index.get("fusion"):
            raise StudentError("This folder is no student: model_index.json has no 'fusion'. Load it with diffusers.")
        models = load_models(source, index, dtype=dtype, error=StudentError, besides=kwargs, **hub)
        student = super(StudentPipeline, kind).from_pretrained(source, **(models | kwargs))  # type: ignore[misc]
        if student.transformer.time_text_embed.fusion.adds_parameters:
            _load_scale_embedder(student.transformer, Path(source) / "transformer")
        return student

    def _start(
        self,
        fusion: dict[str, Any] | None,
        max_sequence_length: int,
        guidance_range: Sequence[float] | None,
        sigmas: Sequence[float] | None,
    ) -> None:
        """Keep what makes this a student, and fuse the transformer unless it is so already.

        ``sigmas`` are the starts of its own steps before the scheduler's shift, where it takes fewer than its teacher.
        """
        if fusion is None:
            raise StudentError("A student pipeline needs 'fusion', the constants of its fused term.")
        try:
            constants = fusion_from_config(dict(fusion))
        except ValidationError as error:
            raise StudentError(f"model_index.json: 'fusion' is not usable: {error.errors()[0]['msg']}.") from error
        self.register_to_config(
            fusion=constants.model_dump(),
            max_sequence_length=max_sequence_length,
            guidance_range=list(guidance_range) if guidance_range else None,
            sigmas=list(sigmas) if sigmas else None,
        )
        self._warned: set[str] = set()
        self._scales: Sequence[float] | None = None
        if not isinstance(self.transformer.time_text_embed, FusedConditioning):
            fuse(self.transformer, constants)

    def _pack(self, pooled_BP: Tensor, null_P: Tensor) -> Tensor:
        """Pooled text with null text and this call's guidance scales. Raises ValueError for a wrong number of them."""
        scales = [float(s) for s in self._scales or [self._guidance_scale]]
        if len(scales) not in (1, len(pooled_BP)):
            raise ValueError(
                f"guidance_scale holds {len(scales)} numbers for {len(pooled_BP)} pictures: give one each."
            )
        for s in scales:
            self._warn_outside_range(s)
        return pack(pooled_BP, null_P, torch.tensor(scales))

    def _warn_outside_range(self, s: float) -> None:
        trained = self.config.guidance_range
        if trained and not trained[0] <= s <= trained[1]:
            low, high = trained
            self._warn_once(f"guidance_scale {s:g} is outside [{low:g}, {high:g}], which this student was trained on")

    def _warn_once(self, what: str) -> None:
        """Of each kind (its first word) once a pipeline."""
        kind = what.partition(" ")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning("%s: expect worse pictures", what)

    def _options(self, max_sequence_length: int | None, options: dict[str, Any]) -> dict[str, Any]:
        """A call's options, with text length and steps as in training. Raises ValueError for what a student lacks."""
        if any(value for name, value in options.items() if name.startswith("negative_prompt")):
            raise ValueError("A TeEFusion student takes no negative prompt: it was taught the direction from '' alone.")
        length = self.config.max_sequence_length if max_sequence_length is None else max_sequence_length
        return self._own_steps(self._own_scales(options)) | {"max_sequence_length": length}

    def _own_scales(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options with one number for the stock pipeline, which makes nothing of it, where the caller has several."""
        scales = options.get("guidance_scale")
        self._scales = scales if isinstance(scales, Sequence) else None
        return options if self._scales is None else options | {"guidance_scale": 1.0}

    def _own_steps(self, options: dict[str, Any]) -> dict[str, Any]:
        """Options with the grid of a student that takes fewer steps than its teacher, unless the caller has another."""
        own, asked = self.config.sigmas, options.get("num_inference_steps")
        if not own or options.get("sigmas") is not None:
            return options
        if asked not in (None, len(own)):
            self._warn_once(f"num_inference_steps {asked} is not {len(own)}, which this student was trained for")
            return options
        return options | {"num_inference_steps": len(own), "sigmas": list(own)}


class TeEFusionSD3Pipeline(StudentPipeline, StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline for a fused student."""

    # A student saved without T5 loads without naming the two missing parts; the parent asks for them by keyword.
    _optional_components: ClassVar[list[str]] = [
        *StableDiffusion3Pipeline._optional_components,
        "text_encoder_3",
        "tokenizer_3",
    ]

    def __init__(
        self,
        transformer: Any,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        fusion: dict[str, Any] | None = None,
        max_sequence_length: int = 256,
        guidance_range: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        StableDiffusion3Pipeline.__init__(
            self,
            transformer=transformer,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self._start(fusion, max_sequence_length, guidance_range, sigmas)

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Never: the second forward is what the student does without."""
        return False

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Any, None, Any, None]:
        """As the parent's, with null text and guidance scale packed into the pooled embeddings."""
        tokens, _, pooled, _ = super().encode_prompt(*args, **(kwargs | {"do_classifier_free_guidance": False}))
        null = [self._get_clip_prompt_embeds("", device=pooled.device, clip_model_index=k)[1] for k in (0, 1)]
        return tokens, None, self._pack(pooled, torch.cat(null, dim=-1)[0]), None

    def __call__(self, *args: Any, max_sequence_length: int | None = None, **kwargs: Any) -> Any:
        """See StableDiffusion3Pipeline. ``max_sequence_length`` defaults to the one the student was trained with."""
        if kwargs.get("skip_guidance_layers") is not None:
            raise ValueError("A TeEFusion student cannot skip layers for guidance: there is no second forward.")
        return super().__call__(*args, **self._options(max_sequence_length, kwargs))


class TeEFusionFluxPipeline(StudentPipeline, FluxPipeline):
    """FluxPipeline for a fused student. Its ``guidance_scale`` is what the stock pipeline calls ``true_cfg_scale``.

    A dev type's own guidance embedder is fed what it was in training, whatever the scale.
    """

    def __init__(
        self,
        scheduler: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        transformer: Any,
        image_encoder: Any = None,
        feature_extractor: Any = None,
        fusion: dict[str, Any] | None = None,
        max_sequence_length: int = 512,
        guidance_range: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        FluxPipeline.__init__(
            self,
            scheduler=scheduler,
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
        )
        self._start(fusion, max_sequence_length, guidance_range, sigmas)

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        """As the parent's, with null text and guidance scale packed into the pooled embeddings."""
        tokens, pooled, text_ids = super().encode_prompt(*args, **kwargs)
        null = self._get_clip_prompt_embeds([""], device=pooled.device)
        return tokens, self._pack(pooled, null[0]), text_ids

    def __call__(self, *args: Any, max_sequence_length: int | None = None, **kwargs: Any) -> Any:
        """See FluxPipeline. ``max_sequence_length`` defaults to the one the student was trained with."""
        if kwargs.get("true_cfg_scale", 1.0) > 1.0:
            raise ValueError("A TeEFusion student needs no true CFG: give its scale as guidance_scale.")
        return super().__call__(*args, **self._options(max_sequence_length, kwargs))


_CLASSES = {kind.__name__: kind for kind in (TeEFusionSD3Pipeline, TeEFusionFluxPipeline)}


def student_class(pipeline: Any) -> type[StudentPipeline]:
    """The student pipeline of a stock pipeline's family. Raises StudentError."""
    for stock, kind in ((StableDiffusion3Pipeline, TeEFusionSD3Pipeline), (FluxPipeline, TeEFusionFluxPipeline)):
        if isinstance(pipeline, stock):
            return kind
    raise StudentError(f"There is no student pipeline for a {type(pipeline).__name__}.")


def _load_scale_embedder(transformer: Any, folder: Path) -> None:
    """The weights that ``distill_cfg`` adds. Raises StudentError if they are not in the folder."""
    prefix = f"{SCALE_EMBEDDER}."
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            inside = name.removeprefix("time_text_embed.")
            if inside.startswith(prefix):
                found[inside.removeprefix(prefix)] = value
    embedder = transformer.time_text_embed.scale_embedder
    if found.keys() != embedder.state_dict().keys():
        raise StudentError(
            f"{folder} holds no guidance MLP (time_text_embed.{prefix}*), which this student's fusion needs. Load it "
            "from a local folder that 'teefusion train' made."
        )
    embedder.load_state_dict(found)
