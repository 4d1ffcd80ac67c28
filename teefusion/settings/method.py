"""What is distilled, and how: teacher, prompts, strategy, targets, fused term, student."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from teefusion.settings.section import Section

Dtype = Literal["float32", "bfloat16", "float16"]
Inverse = Literal["aligned", "official", "picard"]


class TeacherSettings(Section):
    """The frozen model to distil."""

    name: str = "shapes"
    """A preset's name, or a diffusers folder, or a hub id (`owner/name`)."""
    uri: str = ""
    """Diffusers folder or hub id; `bundled:shapes` is the teacher in this package. Set by the preset."""
    revision: str | None = None
    """Hub commit or folder digest (`sha256:...`); filled in when the run starts, then checked by every stage."""
    dtype: Dtype = "float32"
    """Weights' type when sampling; the sampler's own state is always float32."""
    height: int | None = Field(default=None, gt=0, multiple_of=8)
    """Pixels; none is the model's own size."""
    width: int | None = Field(default=None, gt=0, multiple_of=8)
    """Pixels; none is the model's own size."""
    max_sequence_length: int = Field(default=256, ge=0, le=512)
    """T5 tokens a prompt."""
    embedded_guidance: float = Field(default=1.0, ge=0, le=100)
    """What a teacher with a guidance embedder of its own (FLUX.1 dev) is always fed there, and its student too."""


class PromptSettings(Section):
    """Where prompts come from, and which are held out."""

    source: str = "bundled:shapes"
    """A .txt, .json, .jsonl, .csv or .parquet file, or `bundled:shapes`."""
    sha256: str | None = None
    """Digest of the source; filled in when the run starts."""
    heldout_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of prompts, chosen by content hash, that training never sees."""
    max_chars: int = Field(default=2000, gt=0)
    """Longer prompts are dropped, and counted."""

    operational: ClassVar[frozenset[str]] = frozenset({"source"})


class WeightsSource(Section):
    """Further weights that a strategy compares the teacher with."""

    uri: str
    """Diffusers folder or hub id; for a LoRA also a .safetensors file."""
    revision: str | None = None
    """Hub commit or digest (`sha256:...`); filled in when the run starts."""


class LegSettings(Section):
    """One of reflection's velocities."""

    guidance: float | None = Field(default=None, ge=0, le=100)
    """diffusers' s; none is the trajectory's own for strong and normal, the strategy's default for weak. At 1 and at
    0 one branch is enough, and one is computed."""
    transformer: Literal["teacher", "second"] = "teacher"
    """`second` is strategy.second."""
    lora_scale: float = Field(default=0.0, ge=-10, le=10)
    """Of strategy.lora."""


class StrategySettings(Section):
    """How the teacher samples."""

    name: Literal["euler_cfg", "z_sampling", "w2sd"] = "euler_cfg"
    """`euler_cfg`: Euler steps with classifier-free guidance. `z_sampling`, `w2sd`: each step is taken strongly, taken
    back weakly, and taken again; in `z_sampling` strong and weak differ in guidance alone."""
    num_steps: int = Field(default=28, ge=2, le=1000)
    """Steps N of the sigma grid."""
    guidance_min: float = Field(default=1.0, ge=0)
    """Smallest guidance scale taught (diffusers' s)."""
    guidance_max: float = Field(default=7.0, ge=0, le=100)
    """Largest guidance scale taught (diffusers' s)."""
    strong: LegSettings = LegSettings()
    """Reflection: the first step."""
    weak: LegSettings = LegSettings()
    """Reflection: the step back. Its guidance is 0 in `z_sampling` and 1 in `w2sd` unless set, as published."""
    normal: LegSettings | None = None
    """Reflection: the step that counts; none is as `strong`."""
    reflected_steps: int | None = Field(default=None, ge=0)
    """Steps, from the noisiest on, that reflect; none is all but the last."""
    inverse: Inverse = "aligned"
    """Reflection: how the weak step is taken back. `aligned`: at the next timestep of the shifted schedule.
    `official`: at the old timestep, as the published code. `picard`: exactly, by fixed-point iteration."""
    picard_iterations: int = Field(default=8, ge=1, le=100)
    """Each costs the weak leg's forwards."""
    picard_tolerance: float = Field(default=1e-3, gt=0)
    """Largest relative change of the state in the last iteration."""
    second: WeightsSource | None = None
    """A second transformer, of the teacher's shape."""
    lora: WeightsSource | None = None
    """A LoRA of the teacher's transformer."""

    @property
    def reflections(self) -> int:
        """Steps that reflect."""
        if self.name == "euler_cfg":
            return 0
        return self.num_steps - 1 if self.reflected_steps is None else self.reflected_steps

    @property
    def weak_leg(self) -> LegSettings:
        """``weak`` with its guidance filled in."""
        default = 0.0 if self.name == "z_sampling" else 1.0
        return self.weak if self.weak.guidance is not None else self.weak.model_copy(update={"guidance": default})

    @model_validator(mode="after")
    def _range_is_ordered(self) -> Self:
        if self.guidance_min > self.guidance_max:
            raise ValueError(
                f"guidance_min ({self.guidance_min:g}) is above guidance_max ({self.guidance_max:g}): swap them"
            )
        if self.guidance_max <= 1:
            raise ValueError(f"guidance_max is {self.guidance_max:g}: at 1 and below there is no guidance to teach")
        return self

    @model_validator(mode="after")
    def _reflection_is_possible(self) -> Self:
        if self.reflections > self.num_steps - 1:
            raise ValueError(
                f"reflected_steps ({self.reflections}) is above num_steps - 1 ({self.num_steps - 1}): the last step "
                "ends at sigma 0, where no network was trained, so it cannot be taken back"
            )
        legs = {"strong": self.strong, "weak": self.weak, "normal": self.normal or self.strong}
        if self.name == "euler_cfg" and any(leg != LegSettings() for leg in legs.values()):
            raise ValueError("strong, weak and normal mean nothing to euler_cfg: set name to z_sampling or w2sd")
        for name in ("strong", "normal"):
            if legs[name].guidance == 0:
                raise ValueError(f"{name}.guidance is 0, which leaves nothing of the prompt: only weak may be 0")
        if self.name == "z_sampling" and self.normal is not None:
            raise ValueError("z_sampling has no normal leg: its strong one steps again; set name to w2sd")
        weights = {(leg.transformer, leg.lora_scale) for leg in legs.values()}
        if self.name == "z_sampling" and len(weights) > 1:
            raise ValueError("in z_sampling strong and weak differ in guidance alone: set name to w2sd")
        if self.second is None and any(transformer == "second" for transformer, _ in weights):
            raise ValueError("a leg has transformer: second, but second.uri is not set")
        if any(transformer == "second" and scale for transformer, scale in weights):
            raise ValueError("a leg has both transformer: second and a lora_scale: the LoRA is the teacher's")
        if self.lora is None and any(scale for _, scale in weights):
            raise ValueError("a leg has a lora_scale, but lora.uri is not set")
        return self


class TargetSettings(Section):
    """What is stored of the teacher's trajectories."""

    trajectories: int = Field(default=1024, gt=0)
    """Trajectories from training prompts, in the prompts' hash order, going round when there are fewer prompts."""
    heldout_trajectories: int = Field(default=64, gt=0)
    """Trajectories from held-out prompts; the guidance residual is measured on them."""
    states_per_trajectory: int = Field(default=8, gt=0)
    """K, the steps kept of each trajectory's N, drawn without replacement."""
    shard_trajectories: int = Field(default=64, gt=0)
    """Trajectories a shard: what an interruption costs at most."""
    batch_size: Annotated[int, Field(gt=0)] | Literal["auto"] = 64
    """Trajectories sampled together; `auto` is as many as the device has memory for, a shard at most, found by the
    first worker. Part of the content: the batch shape changes the last bits of the arithmetic."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of stored states and velocities; computed in float32 whatever this says."""
    seed: int = Field(default=0, ge=0)
    """Of noise, guidance and step draws."""
    images: str | None = None
    """Folder of captioned pictures (metadata.jsonl with `file_name` and `prompt`), whose noised latents then are the
    states; none is the teacher's own trajectories."""
    images_sha256: str | None = None
    """Digest of that folder; filled in when the run starts."""
    compile: bool = False
    """Whether the transformer is compiled (torch.compile): minutes at the start, faster forwards after."""
    num_processes: int = Field(default=1, gt=0)
    """Workers on this machine, one a GPU; above 1 they run under torchrun. Workers on other machines may join."""
    shard_groups: int = Field(default=1, ge=1, le=64)
    """Steps of the pipeline that make the set together, each with the workers above."""
    parallel_groups: int | None = Field(default=None, ge=1)
    """Most of those steps at once; none is all of them. One that begins when the set is whole ends at once."""

    operational: ClassVar[frozenset[str]] = frozenset({"images", "num_processes", "shard_groups", "parallel_groups"})


class FusionSettings(Section):
    """The term added to the conditioning vector (see `teefusion.fusion`)."""

    variant: Literal["affine", "published", "paper", "balanced", "linear", "unmodulated", "distill_cfg"] = "affine"
    """`affine`: grows with s - 1, and starts as large as the conditioning it joins. `published`: x1000 and /256 as in
    the released student. `paper`: the printed formula, s x1000 and no divisor. `balanced`: that formula, divided so
    that it starts as large as the conditioning. `linear`, `unmodulated`: the paper's ablations. `distill_cfg`: a
    guidance MLP, the baseline that adds parameters."""
    convention: Literal["s", "w"] = "s"
    """What the term is made of: diffusers' scale s, or the paper's strength w = s - 1."""


class StudentSettings(Section):
    """What the student is made for."""

    num_steps: int | None = Field(default=None, ge=1, le=1000)
    """Steps of its own sigma grid, every so many of the teacher's; none is as many as the teacher takes."""
