"""Everything configurable, as one typed, frozen model that is checked before anything is spent.

Sources, strongest first: command line, ``TEEFUSION_*`` variables (nested with ``__``), the ``--config`` file, the
teacher's preset, the defaults below. An unknown key is an error in every one of them.

Guidance is always diffusers' ``s`` (``uncond + s * (cond - uncond)``); the papers' ``w`` is ``s - 1``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from teefusion.errors import ScorerError, SettingsError, TeacherError
from teefusion.files import canonical_json, content_key
from teefusion.scorer_names import DEFAULT_TOKENIZER, HpsVersion, Transparency, hps_version, parse_scorer

ENV_PREFIX = "TEEFUSION_"
# Read elsewhere, and no settings: the image of the compiled pipeline's steps (pipelines/), the progress terminal.
# Nor are secrets: S3's credentials are read where a client is made (teefusion/storage.py).
JOB_VARIABLE = "TEEFUSION_JOB_SETTINGS"
_OTHER_VARIABLES = frozenset(
    {"TEEFUSION_IMAGE", "TEEFUSION_PROGRESS_TTY", JOB_VARIABLE}
    | {f"TEEFUSION_S3_{name}" for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")}
)
# Of variables that hold secrets.
_SECRET_ENDINGS = ("_TOKEN", "PASSWORD", "_KEY", "_KEY_ID", "_SECRET")

Dtype = Literal["float32", "bfloat16", "float16"]
JobStage = Literal["targets", "train"]
"""The stages that may take several machines."""
Inverse = Literal["aligned", "official", "picard"]


class _Section(BaseModel):
    """A group of settings. ``operational`` names those that change where or how fast, never what is computed."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    operational: ClassVar[frozenset[str]] = frozenset()

    def content(self) -> dict[str, Any]:
        """The settings that determine results, JSON-ready; hashed into content keys."""
        return self.model_dump(mode="json", exclude=set(self.operational))


class TeacherSettings(_Section):
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


class PromptSettings(_Section):
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


class WeightsSource(_Section):
    """Further weights that a strategy compares the teacher with."""

    uri: str
    """Diffusers folder or hub id; for a LoRA also a .safetensors file."""
    revision: str | None = None
    """Hub commit or digest (`sha256:...`); filled in when the run starts."""


class LegSettings(_Section):
    """One of reflection's velocities."""

    guidance: float | None = Field(default=None, ge=0, le=100)
    """diffusers' s; none is the trajectory's own for strong and normal, the strategy's default for weak. At 1 and at
    0 one branch is enough, and one is computed."""
    transformer: Literal["teacher", "second"] = "teacher"
    """`second` is strategy.second."""
    lora_scale: float = Field(default=0.0, ge=-10, le=10)
    """Of strategy.lora."""


class StrategySettings(_Section):
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


class TargetSettings(_Section):
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

    operational: ClassVar[frozenset[str]] = frozenset({"images", "num_processes"})


class FusionSettings(_Section):
    """The term added to the conditioning vector (see `teefusion.fusion`)."""

    variant: Literal["affine", "published", "paper", "balanced", "linear", "unmodulated", "distill_cfg"] = "affine"
    """`affine`: grows with s - 1, and starts as large as the conditioning it joins. `published`: x1000 and /256 as in
    the released student. `paper`: the printed formula, s x1000 and no divisor. `balanced`: that formula, divided so
    that it starts as large as the conditioning. `linear`, `unmodulated`: the paper's ablations. `distill_cfg`: a
    guidance MLP, the baseline that adds parameters."""
    convention: Literal["s", "w"] = "s"
    """What the term is made of: diffusers' scale s, or the paper's strength w = s - 1."""


class StudentSettings(_Section):
    """What the student is made for."""

    num_steps: int | None = Field(default=None, ge=1, le=1000)
    """Steps of its own sigma grid, every so many of the teacher's; none is as many as the teacher takes."""


class TrainSettings(_Section):
    """The distillation loop."""

    steps: int = Field(default=10_000, gt=0)
    """Optimizer steps."""
    batch_size: int = Field(default=64, gt=0)
    """States an optimizer step, over all ranks and accumulation steps."""
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    """Micro-batches an optimizer step."""
    learning_rate: float = Field(default=5e-5, gt=0)
    """Peak of the schedule."""
    lr_schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """After the warm-up."""
    warmup_steps: int = Field(default=100, ge=0)
    """Linear warm-up."""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.99, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are clipped to this norm."""
    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Of the averaged weights, which are the student; 0 turns averaging off."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """`adamw_8bit` keeps its states in 8 bits, by the library bitsandbytes."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the forward and backward passes; master weights are float32."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 0 is plain data parallel, 1 shares the optimizer's states among the ranks, 2 gradients too, 3
    weights too. The same steps are taken, but for rounding."""
    offload: bool = False
    """ZeRO: whether the optimizer's states (and at stage 3 the weights) lie in main memory."""
    gradient_checkpointing: bool = False
    """Whether activations are computed again in the backward pass: a third more time, far less memory."""
    compile: bool = False
    """Whether the transformer is compiled (torch.compile)."""
    max_skipped_steps: int = Field(default=5, ge=0)
    """A step whose loss or gradient is not finite is skipped; more than so many in a row stop the run."""
    states: Literal["stored", "student"] = "stored"
    """`stored`: those of the target set. `student`: those that the student itself reaches from noise, with the teacher
    asked while training; its prompts and guidance scales are the target set's."""
    shuffle_mb: int = Field(default=1024, gt=0)
    """Stored states (MiB) a rank holds and shuffles together; as much again is read ahead."""
    loss_weighting: Literal["none", "guidance"] = "none"
    """`guidance` divides each sample's error by its mean squared guidance gap, so small scales count as large ones."""
    log_every: int = Field(default=10, gt=0)
    """Steps between logged losses."""
    eval_every: int = Field(default=500, gt=0)
    """Steps between guidance residuals on held-out states."""
    checkpoint_every: int = Field(default=500, gt=0)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, gt=0)
    seed: int = Field(default=0, ge=0)
    """Of the order of states."""
    num_processes: int = Field(default=1, gt=0)
    """Ranks on this machine; above 1 the stage runs under torchrun."""
    max_restarts: int = Field(default=3, ge=0)
    """torchrun: how often all ranks start again, from the last checkpoint, when one of them dies."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"max_restarts", "log_every", "checkpoint_every", "keep_checkpoints", "num_processes", "max_skipped_steps"}
        | {"zero_stage", "offload", "gradient_checkpointing", "compile"}
    )

    @model_validator(mode="after")
    def _offload_needs_zero(self) -> Self:
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload is ZeRO's: set zero_stage to 1, 2 or 3")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> Self:
        ways = self.gradient_accumulation_steps * self.num_processes
        if self.batch_size % ways:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps} x num_processes {self.num_processes} = {ways}"
            )
        return self


class EvaluateSettings(_Section):
    """The paired comparison of student and teacher."""

    scorer: str = "bundled:shapes"
    """`hps:` and the path or s3:// URI of a published HPS checkpoint, or v2.0 or v2.1 for those on the hub; `clip:`
    (CLIPScore) or `pickscore:` and a transformers CLIP folder or hub id; `bundled:shapes`; or a transformers CLIP
    folder, whose pictures are prepared as HPS's are."""
    scorer_version: HpsVersion | None = None
    """Of an HPS checkpoint whose file name does not say."""
    scorer_revision: str | None = None
    """Commit of a scorer on the hub; none is the newest."""
    tokenizer: str = DEFAULT_TOKENIZER
    """CLIP's tokenizer for weights that come without one, as HPS's do: a folder or hub id."""
    antialias: bool = True
    """Whether pictures are antialiased when they are made smaller for the scorer. HPS's scores depend on it."""
    transparency: Transparency = "white"
    """Of pictures with an alpha channel: composited over white, or refused where they are not opaque."""
    guidance_scale: float = Field(default=4.0, ge=1, le=100)
    """s of teacher and student in the comparison."""
    num_steps: int | None = Field(default=None, ge=2, le=1000)
    """Sampler steps; none is the strategy's."""
    prompts_per_style: int = Field(default=80, gt=0)
    """Held-out prompts scored in each style, in hash order; the HPS benchmark's group size."""
    batch_size: int = Field(default=16, gt=0)
    """Pictures made together."""
    sweep: tuple[float, ...] = (1.0, 2.0, 4.0, 7.0)
    """Guidance scales of the report's grid."""
    sweep_prompts: int = Field(default=4, gt=0)
    """Prompts in the report's grid."""
    seed: int = Field(default=1, ge=0)
    """Of the initial noise, one generator a prompt."""
    num_processes: int = Field(default=1, gt=0)
    """Processes on this machine that make and score pictures, one a GPU; above 1 they run under torchrun. On a shared
    device they slow each other down, which the measured seconds show."""

    operational: ClassVar[frozenset[str]] = frozenset({"num_processes"})

    @model_validator(mode="after")
    def _scorer_is_possible(self) -> Self:
        try:
            scorer = parse_scorer(self.scorer)
            if scorer.kind == "hps":
                hps_version(scorer.location, self.scorer_version)
        except ScorerError as error:
            raise ValueError(str(error)) from error
        if scorer.kind != "hps" and self.scorer_version is not None:
            raise ValueError(f"scorer_version is of hps: scorers alone, and scorer is {self.scorer!r}: unset it")
        if scorer.kind in ("clip", "pickscore") and not self.antialias:
            raise ValueError(f"antialias is off, but {scorer.kind}: was published with it: set it to true")
        return self


class GateSettings(_Section):
    """When a student may be registered as challenger. Margins are shares of the teacher's mean score."""

    margin: float = Field(default=0.01, ge=0, lt=1)
    """Over all prompts: the lower bound of student - teacher must stay above -margin."""
    style_margin: float = Field(default=0.03, ge=0, lt=1)
    """The same in each style, where there are fewer prompts."""
    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """Of the two-sided paired bootstrap interval."""
    resamples: int = Field(default=10_000, ge=1000)
    min_prompts: int = Field(default=20, gt=1)
    """Fewer prompts in a style are no evidence."""
    max_nfe_ratio: float = Field(default=0.5, gt=0)
    """Student's forwards a picture over the teacher's, at most."""
    max_guidance_residual: float = Field(default=1.0, gt=0)
    """At most; 1 is a student that learned no guidance."""
    seed: int = Field(default=0, ge=0)
    """Of the resampling."""


class MlflowSettings(_Section):
    """Tracking and registry. Credentials come from MLflow's own variables, never from here."""

    tracking_uri: str | None = None
    """None is SQLite in the workdir."""
    experiment: str = "teefusion"
    model_name: str | None = None
    """Registered model; none is `teefusion-<teacher>`."""
    timeout_s: float = Field(default=10.0, gt=0)
    """For the server's first answer."""

    operational: ClassVar[frozenset[str]] = frozenset({"tracking_uri", "experiment", "timeout_s"})


class StorageSettings(_Section):
    """Where target sets are kept, and how S3 is spoken to. Credentials come from the environment, never from here."""

    uri: str | None = None
    """A folder, `file:///folder` or `s3://bucket/prefix`; none is the workdir."""
    endpoint_url: str | None = None
    """S3 server, as `https://host:port`; none is AWS."""
    region: str | None = None
    """None is what boto3 finds."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """`path` is what most servers other than AWS need."""
    max_attempts: int = Field(default=10, gt=0)
    """Of a request, with growing pauses between them."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    read_timeout_s: float = Field(default=60.0, gt=0)
    multipart_mb: int = Field(default=64, ge=5, le=5000)
    """Larger objects travel in parts of this size (MiB)."""
    cache_gb: float = Field(default=50.0, gt=0)
    """Disk in the workdir (GiB) for shards read from S3; the ones read longest ago make room."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"uri", "endpoint_url", "region", "addressing_style", "max_attempts", "connect_timeout_s", "read_timeout_s"}
        | {"multipart_mb", "cache_gb"}
    )


class TolerationSettings(_Section):
    """A taint of nodes that pods may be placed on nevertheless; as in Kubernetes, `key: nvidia.com/gpu`."""

    key: str | None = None
    """None is every taint."""
    operator: Literal["Exists", "Equal"] = "Exists"
    value: str | None = None
    """With Equal."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """None is all of them."""

    @model_validator(mode="after")
    def _value_is_compared(self) -> Self:
        if (self.operator == "Equal") != (self.value is not None):
            raise ValueError("operator Equal takes a value, and Exists takes none")
        if self.key is None and self.operator == "Equal":
            raise ValueError("operator Equal takes a key")
        return self


class ClusterSettings(_Section):
    """Training and targets as TrainJobs of Kubeflow Trainer. All of it is where and how fast, none of it what.

    Secrets are named here, never held: their keys become variables of the pods.
    """

    launcher: Literal["auto", "here", "trainjob"] = "auto"
    """`here`: this process, or torchrun on this machine. `auto`: a TrainJob where there are several nodes."""
    context: str | None = None
    """Of the kubeconfig; none is this pod's service account, or else the current context."""
    namespace: str | None = None
    """None is this pod's, or else the context's."""
    runtime: str = "teefusion-torch"
    """Name of the training runtime; its policy must be `torch: {}`."""
    runtime_kind: Literal["TrainingRuntime", "ClusterTrainingRuntime"] = "TrainingRuntime"
    image: str | None = None
    """Best by digest; none is the runtime's."""
    nodes: int = Field(default=1, gt=0)
    """Machines that train."""
    target_nodes: int | None = Field(default=None, gt=0)
    """Machines that make targets; none is `nodes`."""
    processes_per_node: int = Field(default=1, gt=0)
    """Ranks or workers a machine, in place of train.num_processes and targets.num_processes."""
    cpus: float | None = Field(default=None, gt=0)
    """Requested a node; none is the runtime's."""
    memory_gb: float | None = Field(default=None, gt=0)
    """Requested a node (GiB), and its limit; none is the runtime's."""
    accelerator: str = Field(default="nvidia.com/gpu", pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$")
    """The resource as the device plugin calls it."""
    accelerators: int | None = Field(default=None, ge=0)
    """A node; none is one a process, and none at all where device is cpu."""
    node_selector: dict[str, str] = {}
    """Labels of the nodes, as in `{nvidia.com/gpu.product: NVIDIA-H200}`."""
    tolerations: tuple[TolerationSettings, ...] = ()
    shm_gb: float | None = Field(default=16.0, gt=0)
    """Size of /dev/shm (GiB), part of the memory limit; none is the runtime's."""
    volume_claim: str | None = None
    """PersistentVolumeClaim (ReadWriteMany) with the workdir, mounted in the pods as it is mounted here."""
    volume_path: Path | None = None
    """Where it is mounted, here and there."""
    queue: str | None = None
    """Kueue's LocalQueue."""
    priority_class: str | None = None
    """Kueue's WorkloadPriorityClass."""
    service_account: str | None = None
    """Of the training pods; none is the runtime's."""
    image_pull_secrets: tuple[str, ...] = ()
    s3_secret: str | None = None
    """Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, perhaps AWS_SESSION_TOKEN."""
    mlflow_secret: str | None = None
    """Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""
    hub_secret: str | None = None
    """Secret with HF_TOKEN."""
    config_map: str | None = None
    """ConfigMap of which `config_map_keys` become variables of the pods."""
    config_map_keys: tuple[str, ...] = ()
    env: dict[str, str] = {}
    """Further variables of the pods, such as HF_HOME or NCCL_DEBUG. No secrets: anyone can read them."""
    active_deadline_s: int | None = Field(default=None, gt=0)
    """A job is ended and has failed after this long; time in the queue does not count."""
    start_timeout_s: float | None = Field(default=None, gt=0)
    """A job whose nodes are not all running by then is deleted; none waits as long as the queue takes."""
    poll_s: float = Field(default=10.0, gt=0)
    """Between two looks at events and pods; the job's own state is watched."""
    request_timeout_s: float = Field(default=30.0, gt=0)
    """For an answer of the Kubernetes API."""
    patience_s: float = Field(default=600.0, gt=0)
    """How long the Kubernetes API may be away, or an old job take to vanish; the job itself goes on meanwhile."""
    keep_finished: bool = False
    """Whether a completed job stays. A failed one does, until the next attempt takes its place."""

    def content(self) -> dict[str, Any]:
        """Nothing: where a run is computed changes no result."""
        return {}

    def nodes_for(self, stage: JobStage) -> int:
        """Machines of a stage."""
        return self.target_nodes or self.nodes if stage == "targets" else self.nodes

    def takes_trainjob(self, stage: JobStage) -> bool:
        """Whether a stage runs as a TrainJob."""
        return self.launcher == "trainjob" or (self.launcher == "auto" and self.nodes_for(stage) > 1)

    @model_validator(mode="after")
    def _parts_come_together(self) -> Self:
        if (self.volume_claim is None) != (self.volume_path is None):
            raise ValueError("volume_claim and volume_path come together: set both or none")
        if self.volume_path is not None and not self.volume_path.is_absolute():
            raise ValueError(f"volume_path {self.volume_path} is not absolute")
        if bool(self.config_map) != bool(self.config_map_keys):
            raise ValueError("config_map and config_map_keys come together: set both or none")
        if self.priority_class and not self.queue:
            raise ValueError("priority_class is Kueue's, and takes a queue")
        taken = sorted(name for name in self.env if name.startswith("PET_") or name == JOB_VARIABLE)
        if taken:
            raise ValueError(f"env sets {', '.join(taken)}, which the launcher and the training runtime set")
        secret = sorted(name for name in self.env if name.endswith(_SECRET_ENDINGS))
        if secret:
            raise ValueError(f"env sets {', '.join(secret)}, which anyone could read: put it in a Secret and name that")
        twice = sorted(self.env.keys() & set(self.config_map_keys))
        if twice:
            raise ValueError(f"{', '.join(twice)} is both in env and in config_map_keys")
        return self


class Settings(BaseSettings):
    """One run, completely described."""

    model_config = SettingsConfigDict(
        env_prefix=ENV_PREFIX,
        env_nested_delimiter="__",
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
    )

    workdir: Path = Path("work")
    """Folder for everything a run makes."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, ..."""
    teacher: TeacherSettings = TeacherSettings()
    prompts: PromptSettings = PromptSettings()
    strategy: StrategySettings = StrategySettings()
    targets: TargetSettings = TargetSettings()
    fusion: FusionSettings = FusionSettings()
    student: StudentSettings = StudentSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()
    gate: GateSettings = GateSettings()
    mlflow: MlflowSettings = MlflowSettings()
    storage: StorageSettings = StorageSettings()
    cluster: ClusterSettings = ClusterSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Given values only: ``load_settings`` lays the sources over each other, and stored settings stay as stored."""
        return (init_settings,)

    @model_validator(mode="after")
    def _states_fit_the_grid(self) -> Self:
        if self.targets.states_per_trajectory > self.strategy.num_steps:
            raise ValueError(
                f"targets.states_per_trajectory ({self.targets.states_per_trajectory}) is above strategy.num_steps "
                f"({self.strategy.num_steps}): a trajectory has no more states than steps"
            )
        return self

    @model_validator(mode="after")
    def _student_steps_are_stored(self) -> Self:
        steps, stored = self.student.num_steps, self.targets.states_per_trajectory
        if steps is not None and steps > self.strategy.num_steps:
            raise ValueError(
                f"student.num_steps ({steps}) is above strategy.num_steps ({self.strategy.num_steps}): a student takes "
                "no more steps than its teacher took"
            )
        if steps not in (None, self.strategy.num_steps) and self.targets.images:
            raise ValueError(f"student.num_steps ({steps}) joins steps of a trajectory: unset targets.images")
        if steps not in (None, self.strategy.num_steps) and self.train.states == "student":
            raise ValueError(f"student.num_steps ({steps}) joins stored steps: set train.states to stored")
        if steps not in (None, self.strategy.num_steps) and stored != self.strategy.num_steps:
            raise ValueError(
                f"student.num_steps ({steps}) joins the teacher's steps, which takes all of a trajectory's: set "
                f"targets.states_per_trajectory to strategy.num_steps ({self.strategy.num_steps}, not {stored})"
            )
        return self

    @model_validator(mode="after")
    def _batch_divides_over_the_cluster(self) -> Self:
        if self.cluster.takes_trainjob("train"):
            ranks = self.cluster.nodes * self.cluster.processes_per_node
            ways = self.train.gradient_accumulation_steps * ranks
            if self.train.batch_size % ways:
                raise ValueError(
                    f"train.batch_size {self.train.batch_size} is not divisible by train.gradient_accumulation_steps "
                    f"{self.train.gradient_accumulation_steps} x cluster.nodes {self.cluster.nodes} x "
                    f"cluster.processes_per_node {self.cluster.processes_per_node} = {ways}"
                )
        return self

    @property
    def student_steps(self) -> int:
        """Steps of the student's grid."""
        return self.student.num_steps or self.strategy.num_steps

    def content(self) -> dict[str, Any]:
        """Every section's content: what determines the run's results, and nothing else."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: value.content() for name, value in sections.items() if isinstance(value, _Section)}

    def to_json(self) -> str:
        """Canonical JSON from which ``settings_from_json`` makes these settings again."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def run_key(self) -> str:
        """Name of this run: a hash of its content. Complete only once revision and prompt digest are filled in."""
        return content_key(self.content())

    @property
    def model_name(self) -> str:
        """Registered model's name in MLflow."""
        return self.mlflow.model_name or f"teefusion-{Path(self.teacher.name).name}"


def presets() -> list[str]:
    """Names of the teachers that come with a preset, sorted."""
    folder = resources.files("teefusion") / "presets"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def load_settings(*, config: Path | None = None, overrides: Mapping[str, Any] | None = None) -> Settings:
    """Settings from all sources. ``overrides`` are dotted keys (``train.steps``) from the command line.

    Raises SettingsError naming every bad key, TeacherError for a teacher that is neither preset, folder nor hub id.
    """
    _refuse_unknown_variables()
    from_config = _read_yaml(config) if config else {}
    from_command = _nest(overrides or {})
    from_env = EnvSettingsSource(Settings)()
    merged = _merge(_merge(from_config, from_env), from_command)
    name = _teacher_name(merged)
    return validate_settings(_merge(_preset(name), merged))


def settings_from_json(text: str) -> Settings:
    """Settings as stored with a run. Raises SettingsError."""
    try:
        values = json.loads(text)
    except ValueError as error:
        raise SettingsError(f"The run's settings are not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise SettingsError(f"The run's settings are a JSON {type(values).__name__}, an object is needed.")
    return validate_settings(values)


def job_settings(path: Path | None) -> Settings:
    """Settings of a rank or worker: from a file, or of a TrainJob's pod from its variable. Raises SettingsError."""
    if path is None and JOB_VARIABLE not in os.environ:
        raise SettingsError(f"There are no settings: give --settings FILE, or set {JOB_VARIABLE} to their JSON.")
    return settings_from_json(path.read_text() if path else os.environ[JOB_VARIABLE])


def validate_settings(values: Mapping[str, Any]) -> Settings:
    """Settings from complete values. Raises SettingsError naming every bad key."""
    try:
        return Settings(**values)
    except ValidationError as error:
        lines = [
            f"  {'.'.join(str(part) for part in item['loc']) or 'settings'}: {item['msg']}"
            + ("" if item["type"] in ("extra_forbidden", "value_error") else f" (got {item['input']!r})")
            for item in error.errors()
        ]
        raise SettingsError("These settings cannot be used:\n" + "\n".join(lines)) from error


def _teacher_name(values: Mapping[str, Any]) -> str:
    teacher = values.get("teacher", {})
    name = teacher.get("name", "shapes") if isinstance(teacher, Mapping) else teacher
    if not isinstance(name, str):
        raise SettingsError(f"teacher.name must be a string, got {name!r}.")
    return name


def _preset(name: str) -> dict[str, Any]:
    """The preset called ``name``; for a folder or hub id, the defaults with that URI."""
    if name in presets():
        text = (resources.files("teefusion") / "presets" / f"{name}.yaml").read_text()
        values: dict[str, Any] = yaml.safe_load(text)
        return _merge(values, {"teacher": {"name": name}})
    is_hub_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    if Path(name).is_dir() or is_hub_id:
        return {"teacher": {"name": name, "uri": name}}
    raise TeacherError(
        f"Unknown teacher {name!r}: it is no preset ({', '.join(presets())}), no folder, and no hub id (owner/name)."
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"Cannot read the configuration {path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: expected a mapping of sections such as `train:`, got {type(values).__name__}.")
    return values


def _nest(dotted: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in dotted.items():
        *sections, leaf = key.split(".")
        target = nested
        for section in sections:
            target = target.setdefault(section, {})
        target[leaf] = value
    return nested


def _merge(weak: Mapping[str, Any], strong: Mapping[str, Any]) -> dict[str, Any]:
    """``weak`` with ``strong`` laid over it, section by section; neither is changed."""
    merged = dict(weak)
    for key, value in strong.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _merge(below, value) if both and below is not None else value
    return merged


def _refuse_unknown_variables() -> None:
    """pydantic-settings ignores misspelt variables; a run that silently trains with a default is worse than none."""
    known = {ENV_PREFIX + name.upper() for name in _variable_names()} | _OTHER_VARIABLES
    unknown = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name.upper() not in known)
    if unknown:
        raise SettingsError(
            f"Unknown variable{'s' if len(unknown) > 1 else ''} {', '.join(unknown)}: no setting has that name. "
            "Sections are joined with two underscores, as in TEEFUSION_TRAIN__STEPS."
        )


def _variable_names(model: type[BaseModel] | None = None, prefix: str = "") -> Iterator[str]:
    """Names of all settings, nested with two underscores."""
    for name, field in (model or Settings).model_fields.items():
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, _Section):
                yield from _variable_names(kind, f"{prefix}{name}__")
