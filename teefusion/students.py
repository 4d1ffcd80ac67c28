"""Student pipelines for diffusers users: build from a teacher, save, load, prove that a folder loads and runs.

A student folder is a diffusers folder whose transformer has the stock class, names and shapes; what makes it a
student is ``fusion`` in model_index.json. ``pipe(prompt, guidance_scale=s)`` makes one transformer call a step.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file

from teefusion.errors import StorageError, StudentError
from teefusion.fusion import GUIDANCE_EMBEDDER, FusedConditioning, Fusion, fuse, fusion_from_config, make_fusion, pack
from teefusion.loading import load_models
from teefusion.published import is_published, published_parts
from teefusion.storage import publish_folder

log = logging.getLogger(__name__)


class TeEFusionSD3Pipeline(StableDiffusion3Pipeline):
    """StableDiffusion3Pipeline for a fused student: guidance is in the conditioning, not in a second forward.

    Called as its parent is. ``guidance_scale`` is diffusers' s, as everywhere. ``negative_prompt`` is refused, since
    the student learned the direction away from the empty prompt and no other.
    """

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
    ) -> None:
        super().__init__(
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
        if fusion is None:
            raise StudentError("This folder is no student: model_index.json has no 'fusion'. Load it with diffusers.")
        try:
            constants = fusion_from_config(dict(fusion))
        except ValidationError as error:
            raise StudentError(f"model_index.json: 'fusion' is not usable: {error.errors()[0]['msg']}.") from error
        self.register_to_config(
            fusion=constants.model_dump(),
            max_sequence_length=max_sequence_length,
            guidance_range=list(guidance_range) if guidance_range else None,
        )
        self._warned = False
        if not isinstance(transformer.time_text_embed, FusedConditioning):
            fuse(transformer, constants)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *, rounded: bool = False, **kwargs: Any) -> Any:
        """See DiffusionPipeline. Beside that, refuses incomplete weights, and reads those that a guidance MLP adds.

        A folder in the format of the authors' release loads too; ``rounded`` then repeats their rounding of the
        guidance to bfloat16.
        """
        source = pretrained_model_name_or_path
        hub = {name: kwargs[name] for name in ("revision", "cache_dir", "token", "local_files_only") if name in kwargs}
        index = dict(cls.load_config(source, **hub))
        dtype = kwargs.get("dtype", torch.float32)
        if is_published(source, index, **hub):
            fusion = make_fusion("published").model_copy(update={"rounded": rounded})
            return cls(**published_parts(source, index, dtype=dtype, **hub), fusion=fusion.model_dump())
        models = load_models(source, index, dtype=dtype, error=StudentError, besides=kwargs, **hub)
        student = super().from_pretrained(source, **(models | kwargs))
        if student.transformer.time_text_embed.fusion.adds_parameters:
            _load_guidance_embedder(student.transformer, Path(source) / "transformer")
        return student

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Never: the second forward is what the student does without."""
        return False

    def encode_prompt(self, *args: Any, **kwargs: Any) -> tuple[Any, None, Any, None]:
        """As the parent's, with null text and guidance scale packed into the pooled embeddings."""
        tokens, _, pooled, _ = super().encode_prompt(*args, **(kwargs | {"do_classifier_free_guidance": False}))
        null = [self._get_clip_prompt_embeds("", device=pooled.device, clip_model_index=k)[1] for k in (0, 1)]
        guidance = torch.tensor([float(self._guidance_scale)])
        self._warn_outside_range(float(self._guidance_scale))
        return tokens, None, pack(pooled, torch.cat(null, dim=-1)[0], guidance), None

    def _warn_outside_range(self, s: float) -> None:
        """Once a pipeline: such pictures are extrapolated."""
        trained = self.config.guidance_range
        if trained and not trained[0] <= s <= trained[1] and not self._warned:
            self._warned = True
            log.warning(
                "guidance_scale %g is outside [%g, %g], which this student was trained on: expect worse pictures",
                s,
                *trained,
            )

    def __call__(self, *args: Any, max_sequence_length: int | None = None, **kwargs: Any) -> Any:
        """See StableDiffusion3Pipeline. ``max_sequence_length`` defaults to the one the student was trained with."""
        if any(kwargs.get(name) for name in ("negative_prompt", "negative_prompt_2", "negative_prompt_3")):
            raise ValueError("A TeEFusion student takes no negative prompt: it was taught the direction from '' alone.")
        if kwargs.get("skip_guidance_layers") is not None:
            raise ValueError("A TeEFusion student cannot skip layers for guidance: there is no second forward.")
        length = self.config.max_sequence_length if max_sequence_length is None else max_sequence_length
        return super().__call__(*args, max_sequence_length=length, **kwargs)


def make_student(
    pipeline: Any, fusion: Fusion, *, max_sequence_length: int, guidance_range: tuple[float, float] | None = None
) -> Any:
    """A student pipeline of a stock one's parts; its transformer is fused unless it is so already.

    Outside ``guidance_range``, the scales it is trained on, the student warns once.
    """
    parts = {name: getattr(pipeline, name, None) for name in pipeline.components}
    student = TeEFusionSD3Pipeline(
        **parts, fusion=fusion.model_dump(), max_sequence_length=max_sequence_length, guidance_range=guidance_range
    )
    student.set_progress_bar_config(disable=True)
    return student


def save_student(student: Any, folder: Path) -> None:
    """Save to ``folder`` whole or not at all, after loading the copy back and seeing that it makes the same picture.

    Raises StudentError if the saved copy differs, StorageError if it cannot be written.
    """
    with publish_folder(folder) as temporary:
        try:
            student.save_pretrained(temporary, safe_serialization=True)
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"Cannot write the student to {folder}: {error}. Free some space and run again."
            ) from error
        _check_copy(student, load_student(temporary))


def load_student(folder: Path | str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A student pipeline from a folder. Raises StudentError for a folder that is none."""
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.exists():
        raise StudentError(
            f"{folder} is no student folder: model_index.json is missing. Give the folder that 'teefusion train' "
            "reported, for example WORKDIR/students/KEY/student."
        )
    try:
        config = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StudentError(f"{index} cannot be read: {error}.") from error
    if not isinstance(config, dict) or not ("fusion" in config or is_published(folder, config)):
        raise StudentError(f"{folder} is a diffusers folder but no student: model_index.json has no 'fusion'.")
    try:
        student = TeEFusionSD3Pipeline.from_pretrained(folder, dtype=dtype, use_safetensors=True)
    except StudentError:
        raise
    except Exception as error:  # diffusers, transformers and safetensors raise many kinds for a damaged folder
        raise StudentError(f"{folder} cannot be loaded as a student: {error}") from error
    student.set_progress_bar_config(disable=True)
    student.vae.to(memory_format=torch.channels_last)  # as for the teacher, whose speed it is compared with
    return student.to(device)


def _load_guidance_embedder(transformer: Any, folder: Path) -> None:
    """The weights that ``distill_cfg`` adds. Raises StudentError if they are not in the folder."""
    prefix = f"{GUIDANCE_EMBEDDER}."
    found: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, value in load_file(file).items():
            inside = name.removeprefix("time_text_embed.")
            if inside.startswith(prefix):
                found[inside.removeprefix(prefix)] = value
    embedder = transformer.time_text_embed.guidance_embedder
    if found.keys() != embedder.state_dict().keys():
        raise StudentError(
            f"{folder} holds no guidance MLP (time_text_embed.{prefix}*), which this student's fusion needs. Load it "
            "from a local folder that 'teefusion train' made."
        )
    embedder.load_state_dict(found)


def _check_copy(student: Any, copy: Any) -> None:
    """The same weights to the bit, and two steps of both from one seed give the same picture."""
    saved = copy.transformer.state_dict()
    for name, value in student.transformer.state_dict().items():
        if not torch.equal(value.cpu(), saved[name].cpu()):
            raise StudentError(f"The saved student has other weights than the trained one: {name} differs.")
    trained, loaded = _two_steps(student), _two_steps(copy)
    # Not to the bit: where a tensor lies in memory chooses the kernel, and so the last digit.
    if not torch.allclose(trained, loaded, atol=1e-3, rtol=1e-3):
        difference = float((trained - loaded).abs().max())
        raise StudentError(f"The saved student makes other pictures than the trained one (off by {difference:.3g}).")


def _two_steps(pipeline: Any) -> torch.Tensor:
    generator = torch.Generator(pipeline.device).manual_seed(0)
    result = pipeline("", guidance_scale=3.0, num_inference_steps=2, generator=generator, output_type="latent")
    latents: torch.Tensor = result.images.float().cpu()
    return latents
