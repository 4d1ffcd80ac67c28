"""How a step of the pipeline runs on Kubernetes: image, machine, secrets, retries, time, and caching."""

from kfp import dsl, kubernetes

from teefusion.settings import NAMESPACE_VARIABLES, SECRET_KEYS, ClusterSettings, PipelineStep, Settings, StepSettings
from teefusion.trainjobs import gibibytes

_COMPUTES = ("targets", "train", "evaluate")
"""The steps that take an accelerator and torch, and take up their work where it stopped."""
# Limits of the steps that take minutes; those that compute have none but what is set.
_TIMEOUTS_S = {"preflight": 900, "ingest": 3600, "register": 7200, "summarize": 900}
_LONGEST_PAUSE = "1800s"


def place(task: dsl.PipelineTask, step: PipelineStep, name: str, settings: Settings) -> dsl.PipelineTask:
    """The task with its name and all that Kubernetes is to know of it; returns it."""
    options = settings.cluster
    own = options.steps.get(step, StepSettings())
    task.set_display_name(name)
    # The stages keep their own results by content key, and look whether they are still there. KFP's cache does not,
    # and sees neither a changed registry nor a moved teacher.
    task.set_caching_options(False)
    _secure(task, options)
    _configure(task, options)
    _size(task, step, own, settings)
    retries = own.retries if own.retries is not None else options.retries if step in _COMPUTES else 0
    if retries:
        pause = f"{options.retry_pause_s}s"
        task.set_retry(retries, backoff_duration=pause, backoff_factor=2, backoff_max_duration=_LONGEST_PAUSE)
    if limit := own.timeout_s or _TIMEOUTS_S.get(step):
        kubernetes.set_timeout(task, limit)
    return task


def _secure(task: dsl.PipelineTask, options: ClusterSettings) -> None:
    """What restricted pod security asks for and Kubeflow leaves to us; it drops capabilities and the like itself."""
    user = options.run_as_user
    kubernetes.set_security_context(task, run_as_user=user, run_as_group=user, run_as_non_root=True)
    if options.image_pull_secrets:
        kubernetes.set_image_pull_secrets(task, list(options.image_pull_secrets))


def _configure(task: dsl.PipelineTask, options: ClusterSettings) -> None:
    """Variables: secrets by reference, the namespace's ConfigMap, and plain ones. What is not there is left out."""
    for setting, keys in SECRET_KEYS.items():
        if secret := getattr(options, setting):
            kubernetes.use_secret_as_env(task, secret, {key: key for key in keys}, optional=True)
    if options.config_map:
        keys = (*NAMESPACE_VARIABLES, *options.config_map_keys)
        kubernetes.use_config_map_as_env(task, options.config_map, {key: key for key in keys}, optional=True)
    for name, value in options.variables.items():
        task.set_env_variable(name, value)
    if options.volume_claim:
        kubernetes.mount_pvc(task, pvc_name=options.volume_claim, mount_path=str(options.volume_path))


def _size(task: dsl.PipelineTask, step: PipelineStep, own: StepSettings, settings: Settings) -> None:
    """Image and machine. A step that computes has a node as ``cluster`` says; one that starts a TrainJob only waits.

    What ``cluster.steps`` says of the latter is its TrainJob's.
    """
    options = settings.cluster.for_step(step)
    waits = step in ("targets", "train") and options.takes_trainjob(step)
    computes = step in _COMPUTES and not waits
    node = options if computes else StepSettings() if waits else own
    if image := node.image or (None if computes else settings.cluster.small_image or settings.cluster.image):
        task.set_container_image(image)
    if node.cpus:
        task.set_cpu_request(f"{node.cpus:g}")
    if memory := gibibytes(node.memory_gb):
        task.set_memory_request(memory).set_memory_limit(memory)
    count = node.accelerators
    if count is None and computes and settings.device != "cpu":
        count = int(getattr(settings, step).num_processes)  # one a process
    if count:
        task.set_accelerator_type(options.accelerator).set_accelerator_limit(count)
    for label, value in (node.node_selector or {}).items():
        kubernetes.add_node_selector(task, label, value)
    for toleration in node.tolerations or ():
        kubernetes.add_toleration(task, **toleration.model_dump())
    if shm := gibibytes(node.shm_gb):
        kubernetes.empty_dir_mount(task, "dshm", "/dev/shm", medium="Memory", size_limit=shm)
    queue = {"queue-name": options.queue, "priority-class": options.priority_class} if computes else {}
    for label, value in queue.items():
        if value:
            kubernetes.add_pod_label(task, f"kueue.x-k8s.io/{label}", value)
