"""The compiled pipeline: the same every time, without secrets and local paths, and all that Kubernetes is to know."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from teefusion.errors import SettingsError
from teefusion.parameters import arguments_of, settings_of
from teefusion.pipelines.compile import compile_pipeline, pipeline_yaml, version_of
from teefusion.settings import NAMESPACE_VARIABLES, Settings, load_settings

GOLDEN = Path(__file__).parent / "golden" / "pipeline.yaml"
CLUSTER = {
    "cluster.image": "registry.example.com/teefusion@sha256:0123",
    "cluster.small_image": "registry.example.com/teefusion-small@sha256:4567",
    "cluster.image_pull_secrets": ["pull"],
    "cluster.accelerators": 8,
    "cluster.cpus": 32,
    "cluster.memory_gb": 512,
    "cluster.shm_gb": 64,
    "cluster.node_selector": {"nvidia.com/gpu.product": "NVIDIA-H200"},
    "cluster.tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
    "cluster.queue": "gpu",
    "cluster.priority_class": "high",
    "cluster.volume_claim": "teefusion-work",
    "cluster.volume_path": "/shared",
    "cluster.config_map_keys": ["HTTPS_PROXY"],
    "cluster.env": {"HF_HOME": "/shared/cache"},
    "cluster.steps": {"evaluate": {"accelerators": 1, "timeout_s": 7200}, "register": {"memory_gb": 4}},
}
GPU = ("targets", "train", "evaluate")
SMALL = ("preflight", "ingest", "register", "summarize")


def compiled(overrides: dict[str, Any] | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Specification and platform configuration of the pipeline."""
    spec, platform = yaml.safe_load_all(pipeline_yaml(load_settings(overrides=CLUSTER | (overrides or {}))))
    return spec, platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


def container(spec: dict[str, Any], step: str) -> dict[str, Any]:
    found: dict[str, Any] = spec["deploymentSpec"]["executors"][f"exec-{step}"]["container"]
    return found


def tasks(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Every task of every group, by name."""
    groups = [spec["root"], *spec["components"].values()]
    return {name: task for group in groups for name, task in group.get("dag", {}).get("tasks", {}).items()}


def test_the_compiled_pipeline_is_the_one_that_was_looked_at() -> None:
    """Where it has to differ: look at the difference, and write the file anew with GOLDEN=write."""
    spec, *rest = yaml.safe_load_all(pipeline_yaml(load_settings()))
    # The defaults of parameters are settings, which have tests of their own.
    for parameter in spec["root"]["inputDefinitions"]["parameters"].values():
        del parameter["defaultValue"]
    text = re.sub(r"(?m)(image: \S+):\S+$", r"\1:VERSION", yaml.safe_dump_all([spec, *rest]))
    if os.environ.get("GOLDEN") == "write":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
    assert text == GOLDEN.read_text()


def test_kubernetes_resources_carry_the_same_pipeline(tmp_path: Path) -> None:
    settings = load_settings(overrides=CLUSTER | {"kfp.namespace": "team"})
    version = compile_pipeline(settings, tmp_path / "resources.yaml", kubernetes=True)
    pipeline, made = yaml.safe_load_all((tmp_path / "resources.yaml").read_text())
    assert (pipeline["apiVersion"], pipeline["kind"]) == ("pipelines.kubeflow.org/v2beta1", "Pipeline")
    assert pipeline["metadata"] == {"name": "teefusion-distill", "namespace": "team"}
    assert made["kind"] == "PipelineVersion"
    assert made["metadata"] == {"name": f"teefusion-distill-{version}", "namespace": "team"}
    assert made["spec"]["pipelineName"] == "teefusion-distill"
    spec, platform = yaml.safe_load_all(pipeline_yaml(settings))
    assert made["spec"]["pipelineSpec"] == spec
    assert made["spec"]["platformSpec"] == platform


def test_a_version_is_named_by_the_pipeline_and_not_by_the_defaults_of_its_parameters() -> None:
    def version(**overrides: Any) -> str:
        return version_of(
            pipeline_yaml(load_settings(overrides={k.replace("__", "."): v for k, v in overrides.items()}))
        )

    assert version() == version(train__steps=7, teacher__name="sd3-medium", strategy__name="w2sd")
    assert version() != version(cluster__memory_gb=8)
    assert version() != version(targets__shard_groups=2)


def test_no_secret_is_in_a_compiled_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEEFUSION_S3_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    assert "hunter2" not in pipeline_yaml(load_settings(overrides=CLUSTER))


@pytest.mark.parametrize("setting", ["teacher.uri", "prompts.source", "strategy.lora", "workdir"])
def test_a_path_of_this_machine_is_refused(setting: str, tmp_path: Path) -> None:
    value: Any = {"uri": str(tmp_path)} if setting == "strategy.lora" else str(tmp_path)
    with pytest.raises(SettingsError, match=rf"{setting}.*: {tmp_path}"):
        pipeline_yaml(load_settings(overrides=CLUSTER | {setting: value}))


def test_steps_that_compute_have_a_node_and_the_others_a_small_image() -> None:
    spec, platform = compiled()
    for step in GPU:
        assert container(spec, step)["image"] == CLUSTER["cluster.image"]
        resources = container(spec, step)["resources"]
        assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
        assert resources["accelerator"]["resourceCount"] == ("1" if step == "evaluate" else "8")
        assert (resources["resourceCpuRequest"], resources["resourceMemoryLimit"]) == ("32", "512Gi")
        pod = platform[f"exec-{step}"]
        assert pod["nodeSelector"]["labels"] == CLUSTER["cluster.node_selector"]
        assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        shm = {"volumeName": "dshm", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "64Gi"}
        assert pod["emptyDirMounts"] == [shm]
        queue = {"kueue.x-k8s.io/queue-name": "gpu", "kueue.x-k8s.io/priority-class": "high"}
        assert pod["podMetadata"]["labels"] == queue
    for step in SMALL:
        assert container(spec, step)["image"] == CLUSTER["cluster.small_image"]
        assert not {"nodeSelector", "tolerations", "emptyDirMounts", "podMetadata"} & platform[f"exec-{step}"].keys()
        memory = container(spec, step).get("resources", {}).get("resourceMemoryLimit")
        assert memory == ("4Gi" if step == "register" else None)


@pytest.mark.parametrize(
    ("overrides", "count"),
    [
        ({"cluster.accelerators": None, "train.num_processes": 2}, "2"),
        ({"cluster.accelerators": None, "device": "cpu"}, None),
        ({"cluster.accelerators": 0}, None),
    ],
)
def test_a_step_has_an_accelerator_a_process_unless_their_number_is_set(
    overrides: dict[str, Any], count: str | None
) -> None:
    spec, _ = compiled(overrides)
    assert container(spec, "train")["resources"].get("accelerator", {}).get("resourceCount") == count


def test_every_step_gets_secrets_and_settings_by_reference_the_volume_and_restricted_rights() -> None:
    spec, platform = compiled()
    for step in (*GPU, *SMALL):
        pod = platform[f"exec-{step}"]
        secrets = {one["secretName"]: one for one in pod["secretAsEnv"]}
        assert secrets.keys() == {"teefusion-s3", "teefusion-mlflow", "teefusion-hub"}
        assert all(one["optional"] for one in secrets.values())
        keys = [(pair["secretKey"], pair["envVar"]) for pair in secrets["teefusion-s3"]["keyToEnv"]]
        names = ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN")
        assert keys == [(f"TEEFUSION_S3_{name}", f"TEEFUSION_S3_{name}") for name in names]
        (config,) = pod["configMapAsEnv"]
        assert (config["configMapName"], config["optional"]) == ("teefusion-settings", True)
        assert [pair["envVar"] for pair in config["keyToEnv"]] == [*NAMESPACE_VARIABLES, "HTTPS_PROXY"]
        (volume,) = pod["pvcMount"]
        assert (volume["constant"], volume["mountPath"]) == ("teefusion-work", "/shared")
        assert pod["imagePullSecret"][0]["secretName"] == "pull"
        assert pod["securityContext"] == {"runAsUser": "1000", "runAsGroup": "1000", "runAsNonRoot": True}
        assert container(spec, step)["env"] == [{"name": "HF_HOME", "value": "/shared/cache"}]
    _, chosen = compiled({"cluster.run_as_user": None})  # by OpenShift
    assert all(pod["securityContext"] == {"runAsNonRoot": True} for pod in chosen.values())


def test_only_steps_that_take_up_their_work_are_tried_again_and_the_others_have_a_time_limit() -> None:
    spec, platform = compiled()
    for name, task in tasks(spec).items():
        if name in GPU:
            policy = task["retryPolicy"]
            assert policy == {
                "maxRetryCount": 3,
                "backoffDuration": "60s",
                "backoffFactor": 2.0,
                "backoffMaxDuration": "1800s",
            }
        else:
            assert "retryPolicy" not in task
    limits = {step: platform[f"exec-{step}"].get("activeDeadlineSeconds") for step in (*GPU, *SMALL)}
    assert {step for step, limit in limits.items() if limit is None} == {"targets", "train"}
    assert limits["evaluate"] == "7200"


def test_kubeflows_cache_is_off_for_all_steps_as_the_stages_keep_their_own() -> None:
    spec, _ = compiled()
    steps = {name: task for name, task in tasks(spec).items() if name in (*GPU, *SMALL)}
    assert steps.keys() == {*GPU, *SMALL}
    assert all(task["cachingOptions"] == {} for task in steps.values())


def test_a_step_that_starts_a_trainjob_waits_on_a_small_machine() -> None:
    spec, platform = compiled({"cluster.nodes": 2, "cluster.processes_per_node": 8, "cluster.target_nodes": 1})
    assert "resources" not in container(spec, "train")
    assert "nodeSelector" not in platform["exec-train"]
    assert container(spec, "train")["image"] == CLUSTER["cluster.small_image"]
    assert container(spec, "targets")["resources"]["accelerator"]["resourceCount"] == "8"
    own = {"image": "own", "memory_gb": 64, "accelerators": 4, "node_selector": {"a": "b"}, "timeout_s": 60}
    spec, platform = compiled({"cluster.nodes": 2, "cluster.processes_per_node": 8, "cluster.steps": {"train": own}})
    assert "resources" not in container(spec, "train")  # which the nodes of the TrainJob have
    assert container(spec, "train")["image"] == CLUSTER["cluster.small_image"]
    assert (platform["exec-train"].get("nodeSelector"), platform["exec-train"]["activeDeadlineSeconds"]) == (None, "60")


def test_downloads_go_to_the_volume_where_nothing_else_is_said() -> None:
    spec, _ = compiled({"cluster.env": {}})
    assert container(spec, "train")["env"] == [{"name": "HF_HOME", "value": "/shared/hub"}]


def test_targets_fan_out_with_a_limit_and_training_waits_for_all_of_them() -> None:
    spec, platform = compiled({"targets.shard_groups": 3, "targets.parallel_groups": 2})
    found = tasks(spec)
    (loop,) = [task for task in found.values() if "parameterIterator" in task]
    assert json.loads(loop["parameterIterator"]["items"]["raw"]) == [0, 1, 2]
    assert loop["iteratorPolicy"] == {"parallelismLimit": 2}
    (worker,) = spec["components"][loop["componentRef"]["name"]]["dag"]["tasks"].values()
    assert worker["retryPolicy"]["maxRetryCount"] == 3
    one = spec["components"][worker["componentRef"]["name"]]["executorLabel"].removeprefix("exec-")
    assert container(spec, one)["resources"]["accelerator"]["resourceCount"] == "8"
    assert container(spec, one)["image"] == CLUSTER["cluster.image"]
    alone, placed = compiled()
    assert platform[f"exec-{one}"] == placed["exec-targets"]
    stages = spec["components"]["comp-exit-handler-1"]["dag"]["tasks"]
    assert {"target-workers", "ingest"} <= set(stages["targets"]["dependentTasks"])
    assert "targets" in stages["train"]["dependentTasks"]
    assert container(spec, "targets")["image"] == CLUSTER["cluster.small_image"]
    assert not any("parameterIterator" in task for task in tasks(alone).values())


def test_arguments_are_read_again_as_the_settings_they_were_made_of() -> None:
    settings = load_settings(overrides=CLUSTER | {"teacher.revision": "c0ffee", "student.num_steps": 10})
    arguments = arguments_of(settings)
    assert settings_of(arguments) == settings
    assert settings_of(arguments | {"teacher_revision": "", "gate": {}}).teacher.revision is None


def test_a_namespace_says_where_things_are_and_not_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = arguments_of(load_settings())
    monkeypatch.setenv("TEEFUSION_MLFLOW__TRACKING_URI", "http://mlflow:5000")
    monkeypatch.setenv("TEEFUSION_WORKDIR", "/shared/team")
    assert settings_of(arguments).mlflow.tracking_uri is None
    monkeypatch.setenv("KFP_POD_NAME", "step")
    found: Settings = settings_of(arguments)
    assert (found.mlflow.tracking_uri, found.workdir) == ("http://mlflow:5000", Path("/shared/team"))
    monkeypatch.setenv("TEEFUSION_TRAIN__STEPS", "7")
    with pytest.raises(SettingsError, match="would change what the run computes"):
        settings_of(arguments)


def test_what_a_run_says_of_its_pods_stands_over_the_namespace(monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"cluster.image": "new", "cluster.hub_secret": None, "cluster.env": {"NCCL_DEBUG": "INFO"}}
    arguments = arguments_of(load_settings(overrides=run))
    monkeypatch.setenv("KFP_POD_NAME", "step")
    namespace = {"IMAGE": "old", "QUEUE": "gpu", "HUB_SECRET": "hub"}
    namespace["ENV"] = '{"NCCL_DEBUG": "WARN", "HTTPS_PROXY": "p"}'
    for name, value in namespace.items():
        monkeypatch.setenv(f"TEEFUSION_CLUSTER__{name}", value)
    found = settings_of(arguments).cluster
    assert (found.image, found.queue, found.hub_secret) == ("new", "gpu", None)
    assert found.env == {"NCCL_DEBUG": "INFO", "HTTPS_PROXY": "p"}
