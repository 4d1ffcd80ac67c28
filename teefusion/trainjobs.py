"""A stage on several machines, as a TrainJob of Kubeflow Trainer v2: settings in, manifest out, no I/O.

The job's pods run ``torchrun -m MODULE``; the runtime's torch policy tells torchrun (PET_* variables) how many nodes
there are, which one it is on and where the first one listens. The runtime is ours (``cluster.runtime``), with one
replicated job and one container, both called ``node``. What a TrainJob cannot say itself goes into a runtime patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from teefusion.errors import SettingsError
from teefusion.files import content_key
from teefusion.settings import JOB_VARIABLE, SECRET_KEYS, ClusterSettings, JobStage, Settings
from teefusion.sources import paths_of
from teefusion.storage import is_remote, local_path

GROUP, VERSION, PLURAL = "trainer.kubeflow.org", "v1alpha1", "trainjobs"
NODE = "node"
"""Name of the runtime's replicated job and of its container, fixed by Trainer."""
DIGEST = "teefusion.io/digest"
"""Annotation with which a job of other settings is told from the one that would be made now."""
_MANAGER = "teefusion.io/launcher"
_SHM, _SHARED = "dshm", "teefusion-shared"


@dataclass(frozen=True)
class Work:
    """What every process of the job runs."""

    stage: JobStage
    module: str
    """With a ``main`` that takes the arguments, and its settings from the variable."""
    arguments: Mapping[str, str]
    """Options by name: folders and URIs, the same on every machine."""


def trainjob_name(stage: JobStage, run_key: str) -> str:
    """Of the stage's job in a run: a step that is tried again finds the job of its first attempt by it."""
    return f"teefusion-{stage}-{run_key}"


def build_trainjob(
    settings: Settings, work: Work, *, namespace: str, owner: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The TrainJob of a stage; ``owner`` is an owner reference, with whose object the job is deleted.

    Raises SettingsError where pods could not reach what the work reads and writes.
    """
    require_reachable(settings, work)
    options = settings.cluster.for_step(work.stage)
    settings = settings.model_copy(update={"cluster": options})  # of which lineage tells, too
    spec = _given(
        {
            "runtimeRef": {"apiGroup": GROUP, "kind": options.runtime_kind, "name": options.runtime},
            "activeDeadlineSeconds": options.active_deadline_s,
            "trainer": _trainer(settings, work),
            "runtimePatches": _patches(options),
        }
    )
    metadata = {
        "name": trainjob_name(work.stage, settings.run_key),
        "namespace": namespace,
        "labels": _labels(settings, work.stage),
        "annotations": {DIGEST: content_key(spec)},
        "ownerReferences": [dict(owner)] if owner else None,
    }
    return {"apiVersion": f"{GROUP}/{VERSION}", "kind": "TrainJob", "metadata": _given(metadata), "spec": spec}


def _labels(settings: Settings, stage: JobStage) -> dict[str, str]:
    options = settings.cluster
    return _given(
        {
            "app.kubernetes.io/name": "teefusion",
            "app.kubernetes.io/component": stage,
            "app.kubernetes.io/managed-by": "teefusion",
            "teefusion.io/run-key": settings.run_key,
            "kueue.x-k8s.io/queue-name": options.queue,
            "kueue.x-k8s.io/priority-class": options.priority_class,
        }
    )


def _trainer(settings: Settings, work: Work) -> dict[str, Any]:
    options = settings.cluster
    return _given(
        {
            "image": options.image,
            "numNodes": options.nodes_for(work.stage),
            "numProcPerNode": options.processes_per_node,
            "command": ["torchrun"],
            "args": ["-m", work.module, *(_literal(f"--{name}={value}") for name, value in work.arguments.items())],
            "env": _env(settings),
            "resourcesPerNode": _resources(settings),
        }
    )


def _resources(settings: Settings) -> dict[str, Any] | None:
    """Quantities as strings. The CPU has no limit: it would throttle, and what is spare is nobody's loss."""
    options = settings.cluster
    count = options.accelerators
    if count is None:
        count = 0 if settings.device == "cpu" else options.processes_per_node
    memory = _given({"memory": gibibytes(options.memory_gb)})
    devices = {options.accelerator: str(count)} if count else {}
    cpus = {"cpu": f"{options.cpus:g}"} if options.cpus else {}
    return _given({"requests": cpus | memory | devices, "limits": memory | devices}) or None


def _env(settings: Settings) -> list[dict[str, Any]]:
    options = settings.cluster
    plain = {JOB_VARIABLE: settings.to_json()} | options.variables
    env: list[dict[str, Any]] = [{"name": name, "value": _literal(value)} for name, value in plain.items()]
    for setting, keys in SECRET_KEYS.items():
        secret = getattr(options, setting)
        for key in keys if secret else ():
            reference = {"name": secret, "key": key, "optional": True}
            env.append({"name": key, "valueFrom": {"secretKeyRef": reference}})
    for key in options.config_map_keys:
        reference = {"name": options.config_map, "key": key, "optional": True}
        env.append({"name": key, "valueFrom": {"configMapKeyRef": reference}})
    return env


def _patches(options: ClusterSettings) -> list[dict[str, Any]] | None:
    """What pods get beyond the runtime's template. Their variables cannot stand here, only in ``trainer.env``."""
    volumes, mounts = _volumes(options)
    pod = _given(
        {
            "securityContext": _given({"runAsUser": options.run_as_user, "runAsGroup": options.run_as_user}),
            "serviceAccountName": options.service_account,
            "nodeSelector": options.node_selector,
            "tolerations": [toleration.model_dump(exclude_none=True) for toleration in options.tolerations],
            "imagePullSecrets": [{"name": name} for name in options.image_pull_secrets],
            "volumes": volumes,
            "containers": [{"name": NODE, "volumeMounts": mounts}] if mounts else None,
        }
    )
    if not pod:
        return None
    job = {"name": NODE, "template": {"spec": {"template": {"spec": pod}}}}
    return [{"manager": _MANAGER, "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [job]}}}}]


def _volumes(options: ClusterSettings) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Volumes and mounts: memory for /dev/shm, of which a container has 64 MiB by itself, and the shared claim."""
    volumes: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []
    if options.shm_gb:
        volumes.append({"name": _SHM, "emptyDir": {"medium": "Memory", "sizeLimit": gibibytes(options.shm_gb)}})
        mounts.append({"name": _SHM, "mountPath": "/dev/shm"})
    if options.volume_claim:
        volumes.append({"name": _SHARED, "persistentVolumeClaim": {"claimName": options.volume_claim}})
        mounts.append({"name": _SHARED, "mountPath": str(options.volume_path)})
    return volumes, mounts


def require_reachable(settings: Settings, work: Work) -> None:
    """Raise SettingsError unless all folders that the job's pods will open are on the volume they share with us."""
    unread = {"prompts.source"} | ({"targets.images"} if work.stage != "targets" else set())
    sources = {name: path for name, path in paths_of(settings).items() if name not in unread}
    named = {"workdir": str(settings.workdir)} | dict(work.arguments) | sources
    volume = settings.cluster.volume_path
    for name, uri in named.items():
        if is_remote(uri):
            continue
        path = local_path(uri)
        if volume is None:
            raise SettingsError(
                f"{name} is {path}, a folder of this machine, which the pods of a TrainJob cannot see. Set "
                "cluster.volume_claim and cluster.volume_path to a shared volume that is mounted here too, and put the "
                "workdir on it. Target sets may lie in S3 (storage.uri); prompts and students need the volume."
            )
        if not path.is_relative_to(volume) or ".." in path.parts:
            raise SettingsError(
                f"{name} is {path}, which is not on the shared volume at {volume} (cluster.volume_path), so the "
                "pods of a TrainJob cannot see it. Give an absolute path below it."
            )


def _literal(text: str) -> str:
    """As Kubernetes must be told it: in arguments and variables $(NAME) stands for a variable, and $$ for a dollar."""
    return text.replace("$", "$$")


def gibibytes(value: float | None) -> str | None:
    """A quantity: whole MiB where it is no whole GiB, as a fraction may be stored otherwise than it was sent."""
    if value is None:
        return None
    return f"{value:.0f}Gi" if value == int(value) else f"{value * 1024:.0f}Mi"


def _given(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is none or empty: an absent field leaves the runtime's."""
    return {name: value for name, value in values.items() if value is not None and value != {} and value != []}
