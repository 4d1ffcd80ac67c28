"""Stages on a cluster: steps of a pipeline, and TrainJobs over several machines."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from teefusion.settings.section import JOB_VARIABLE, Section

JobStage = Literal["targets", "train"]
"""The stages that may take several machines."""
PipelineStep = Literal["preflight", "ingest", "targets", "train", "evaluate", "register", "summarize"]
"""Steps of the pipeline, by their component."""
NAMESPACE_VARIABLES = (
    "TEEFUSION_WORKDIR",
    *(f"TEEFUSION_STORAGE__{name}" for name in ("URI", "ENDPOINT_URL", "REGION", "ADDRESSING_STYLE", "CACHE_GB")),
    *(f"TEEFUSION_MLFLOW__{name}" for name in ("TRACKING_URI", "EXPERIMENT")),
    *(f"TEEFUSION_CLUSTER__{name}" for name in ("RUNTIME", "RUNTIME_KIND", "IMAGE", "IMAGE_PULL_SECRETS", "QUEUE")),
    *(f"TEEFUSION_CLUSTER__{name}" for name in ("VOLUME_CLAIM", "VOLUME_PATH", "SERVICE_ACCOUNT", "RUN_AS_USER")),
    *(f"TEEFUSION_CLUSTER__{name}_SECRET" for name in ("S3", "MLFLOW", "HUB")),
    *(f"TEEFUSION_CLUSTER__{name}" for name in ("ACCELERATOR_MEMORY_GB", "ENV")),
)
"""Keys of the namespace's ConfigMap that become variables of a pipeline's steps, where they are there."""
SECRET_KEYS = {
    "s3_secret": ("TEEFUSION_S3_ACCESS_KEY_ID", "TEEFUSION_S3_SECRET_ACCESS_KEY", "TEEFUSION_S3_SESSION_TOKEN"),
    "mlflow_secret": ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"),
    "hub_secret": ("HF_TOKEN",),
}
"""Keys of each secret, which are the variables' names too. None has to be there: a pod that starts can say what it
lacks, and one that waits for a key cannot."""
# Of variables that hold secrets.
_SECRET_ENDINGS = ("_TOKEN", "PASSWORD", "_KEY", "_KEY_ID", "_SECRET")


class TolerationSettings(Section):
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


class StepSettings(Section):
    """What a step of the pipeline, or its TrainJob, is given otherwise than `cluster` says; none is as that says."""

    image: str | None = None
    cpus: float | None = Field(default=None, gt=0)
    memory_gb: float | None = Field(default=None, gt=0)
    """GiB, requested and the limit."""
    accelerators: int | None = Field(default=None, ge=0)
    node_selector: dict[str, str] | None = None
    tolerations: tuple[TolerationSettings, ...] | None = None
    shm_gb: float | None = Field(default=None, gt=0)
    retries: int | None = Field(default=None, ge=0)
    timeout_s: int | None = Field(default=None, gt=0)
    """The step is ended after this long, queueing not counted."""


class ClusterSettings(Section):
    """Stages on Kubernetes. All of it is where and how fast, none of it what.

    `nodes` and what a node has are those of a TrainJob of Kubeflow Trainer, and of the pipeline's steps that compute
    (targets, train, evaluate) where they run in their own pod. Secrets are named here, never held: their keys become
    variables of the pods, and a Secret that is not there gives none.
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
    """Best by digest. None is the runtime's in a TrainJob, and TEEFUSION_IMAGE in the pipeline's steps."""
    small_image: str | None = None
    """Of the pipeline's steps that need no torch; none is `image`."""
    steps: dict[PipelineStep, StepSettings] = Field(default_factory=dict)
    """Single steps of the pipeline that are given something else."""
    retries: int = Field(default=3, ge=0)
    """How often targets, train and evaluate are tried again, which take up their work where it stopped."""
    retry_pause_s: int = Field(default=60, gt=0)
    """Before the first; twice as long before each further one, half an hour at most."""
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
    accelerator_memory_gb: float | None = Field(default=None, gt=0)
    """Of one accelerator (GiB), for a preflight to hold its estimate against; none is as the driver here says."""
    node_selector: dict[str, str] = Field(default_factory=dict)
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
    run_as_user: int | None = Field(default=1000, gt=0)
    """User and group of the pods, as in our images; none is the cluster's choice, as OpenShift wants."""
    image_pull_secrets: tuple[str, ...] = ()
    s3_secret: str | None = "teefusion-s3"
    """Secret with TEEFUSION_S3_ACCESS_KEY_ID and TEEFUSION_S3_SECRET_ACCESS_KEY, perhaps TEEFUSION_S3_SESSION_TOKEN."""
    mlflow_secret: str | None = "teefusion-mlflow"
    """Secret with MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN."""
    hub_secret: str | None = "teefusion-hub"
    """Secret with HF_TOKEN."""
    config_map: str | None = "teefusion-settings"
    """ConfigMap of the namespace. The pipeline's steps take from it what `NAMESPACE_VARIABLES` lists. It has the last
    word on where things are, but for settings of this section that the run itself sets."""
    config_map_keys: tuple[str, ...] = ()
    """Further keys of it that become variables, of a TrainJob's pods too."""
    env: dict[str, str] = Field(default_factory=dict)
    """Further variables of the pods, such as NCCL_DEBUG. No secrets: anyone can read them. HF_HOME is `hub` on the
    volume unless it is given, so that a teacher is downloaded once."""
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

    @property
    def variables(self) -> dict[str, str]:
        """`env`, and where on the volume downloads are shared."""
        if self.volume_path is None or "HF_HOME" in self.config_map_keys:
            return self.env
        return {"HF_HOME": str(self.volume_path / "hub")} | self.env

    def for_step(self, step: PipelineStep) -> Self:
        """These settings with what `steps` says of one step laid over them, but for its time limit."""
        own = {name: value for name, value in self.steps.get(step, StepSettings()) if value is not None}
        own.pop("timeout_s", None)
        return self.model_copy(update=own)

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
        if self.config_map_keys and not self.config_map:
            raise ValueError("config_map_keys are keys of config_map: set that too")
        if self.priority_class and not self.queue:
            raise ValueError("priority_class is Kueue's, and takes a queue")
        taken = sorted(name for name in self.env if name.startswith("PET_") or name == JOB_VARIABLE)
        if taken:
            raise ValueError(f"env sets {', '.join(taken)}, which the launcher and the training runtime set")
        secret = sorted(name for name in self.env if name.endswith(_SECRET_ENDINGS))
        if secret:
            raise ValueError(f"env sets {', '.join(secret)}, which anyone could read: put it in a Secret and name that")
        referred = [key for setting, keys in SECRET_KEYS.items() if getattr(self, setting) for key in keys]
        referred += NAMESPACE_VARIABLES if self.config_map else ()
        given = Counter([*self.env, *self.config_map_keys, *referred])
        twice = sorted(name for name, times in given.items() if times > 1)
        if twice:
            raise ValueError(
                f"pods would get {', '.join(twice)} twice: name a variable in env or in config_map_keys, and none that "
                "they get from config_map or a Secret anyway"
            )
        return self
