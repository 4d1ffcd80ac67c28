"""The manifest of a TrainJob: as published, named by its run, and refused where pods could not do the work."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob

from teefusion.errors import SettingsError
from teefusion.settings import JOB_VARIABLE, Settings, job_settings, load_settings, settings_from_json
from teefusion.trainjobs import DIGEST, Work, build_trainjob, trainjob_name

SHARED = {"workdir": Path("/shared/work"), "cluster.volume_claim": "claim", "cluster.volume_path": "/shared"}
FULL = SHARED | {
    "train.batch_size": 64,
    "cluster.image": "registry.example.com/teefusion@sha256:0123",
    "cluster.nodes": 2,
    "cluster.target_nodes": 16,
    "cluster.processes_per_node": 8,
    "cluster.cpus": 32,
    "cluster.memory_gb": 512,
    "cluster.shm_gb": 0.5,
    "cluster.node_selector": {"nvidia.com/gpu.product": "NVIDIA-H200"},
    "cluster.tolerations": [{"key": "nvidia.com/gpu", "effect": "NoSchedule"}],
    "cluster.queue": "gpu",
    "cluster.priority_class": "high",
    "cluster.service_account": "teefusion-trainer",
    "cluster.image_pull_secrets": ["pull"],
    "cluster.s3_secret": "s3",
    "cluster.mlflow_secret": "mlflow",
    "cluster.hub_secret": "hub",
    "cluster.config_map": "options",
    "cluster.config_map_keys": ["HTTPS_PROXY"],
    "cluster.env": {"HF_HOME": "/shared/hub", "NCCL_DEBUG": "$(WARN)"},
    "cluster.active_deadline_s": 259_200,
}
OWNER = {"apiVersion": "argoproj.io/v1alpha1", "kind": "Workflow", "name": "distill-x", "uid": "u-1"}
WORK = Work(
    "train",
    "teefusion.training",
    {"prompts": "/shared/work/prompts/P", "targets": "s3://bucket/targets/T", "output": "/shared/work/students/S"},
)


def settings(overrides: dict[str, Any] | None = None) -> Settings:
    return load_settings(overrides=SHARED | (overrides or {}))


def build(overrides: dict[str, Any] | None = None, work: Work = WORK) -> dict[str, Any]:
    return build_trainjob(settings(overrides), work, namespace="team")


def variables(manifest: dict[str, Any]) -> dict[str, Any]:
    env = manifest["spec"]["trainer"]["env"]
    assert len({entry["name"] for entry in env}) == len(env)
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in env}


def pod(manifest: dict[str, Any]) -> dict[str, Any]:
    (patch,) = manifest["spec"]["runtimePatches"]
    (job,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == "node"
    found: dict[str, Any] = job["template"]["spec"]["template"]["spec"]
    return found


def test_everything_set_is_in_the_manifest() -> None:
    chosen = load_settings(overrides=FULL)
    manifest = build_trainjob(chosen, WORK, namespace="team", owner=OWNER)
    settings_json = manifest["spec"]["trainer"]["env"].pop(0)
    assert settings_json["name"] == JOB_VARIABLE
    assert manifest["metadata"].pop("annotations").keys() == {DIGEST}
    wanted = (Path(__file__).parent / "golden" / "trainjob.yaml").read_text()
    assert manifest == yaml.safe_load(wanted.replace("RUN_KEY", chosen.run_key))


@pytest.mark.parametrize("overrides", [FULL, SHARED, SHARED | {"cluster.shm_gb": None, "device": "cpu"}])
def test_the_published_models_know_every_field(overrides: dict[str, Any]) -> None:
    manifest = build_trainjob(load_settings(overrides=overrides), WORK, namespace="team", owner=OWNER)
    # The models drop what they do not know, so what comes back tells of a misspelt field.
    parsed = TrainerV1alpha1TrainJob.from_dict(manifest)
    assert parsed is not None
    assert json.loads(json.dumps(parsed.to_dict(), default=str)) == manifest


@given(st.integers(0, 2**31), st.integers(1, 100), st.sampled_from(["a", "b"]), st.booleans())
def test_the_name_depends_on_the_run_alone_and_is_a_dns_label(seed: int, nodes: int, image: str, many: bool) -> None:
    run = load_settings(overrides={"train.seed": seed})
    cluster = {"nodes": nodes, "image": image, "keep_finished": many, "node_selector": {"a": image}}
    moved = settings_from_json(json.dumps(json.loads(run.to_json()) | {"cluster": cluster | {"launcher": "here"}}))
    assert moved.run_key == run.run_key
    for stage in ("train", "targets"):
        name = trainjob_name(stage, run.run_key)
        assert name == trainjob_name(stage, moved.run_key)
        # JobSet and Job make longer names of it, of 63 characters at most.
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", f"{name}-node-0-9999-abcde")
        assert len(f"{name}-node-0-9999-abcde") <= 63
    other = load_settings(overrides={"train.seed": seed + 1})
    assert trainjob_name("train", other.run_key) != trainjob_name("train", run.run_key)


def test_the_pods_get_the_same_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = settings({"prompts.source": "/shared/$(HOME)/$$prompts.txt"})
    told = variables(build_trainjob(chosen, WORK, namespace="team"))[JOB_VARIABLE]
    monkeypatch.setenv(JOB_VARIABLE, re.sub(r"\$\$", "$", told))  # as Kubernetes expands it
    assert job_settings(None) == chosen


def test_a_process_without_settings_says_so() -> None:
    with pytest.raises(SettingsError, match="give --settings FILE, or set TEEFUSION_JOB_SETTINGS"):
        job_settings(None)


def test_no_credential_is_in_a_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TEEFUSION_S3_SECRET_ACCESS_KEY", "AWS_SECRET_ACCESS_KEY", "MLFLOW_TRACKING_PASSWORD", "HF_TOKEN"):
        monkeypatch.setenv(name, "hunter2")
    assert "hunter2" not in json.dumps(build(FULL))


def test_targets_take_their_own_number_of_nodes() -> None:
    work = Work("targets", "teefusion.target_sets", {"prompts": "/shared/p", "output": "s3://bucket/t"})
    trainer = build(FULL, work)["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (16, 8)
    assert trainer["args"][1] == "teefusion.target_sets"


def test_what_is_not_set_is_left_to_the_runtime() -> None:
    nothing = {"cluster.shm_gb": None, "cluster.run_as_user": None}
    manifest = build({"device": "cpu", "cluster.launcher": "trainjob"} | nothing)
    assert manifest["spec"].keys() == {"runtimeRef", "trainer", "runtimePatches"}
    assert manifest["spec"]["trainer"].keys() == {"numNodes", "numProcPerNode", "command", "args", "env"}
    assert pod(manifest).keys() == {"volumes", "containers"}
    assert "ownerReferences" not in manifest["metadata"]


@pytest.mark.parametrize(
    ("overrides", "devices"),
    [
        ({"cluster.processes_per_node": 4}, {"nvidia.com/gpu": "4"}),
        ({"cluster.accelerator": "amd.com/gpu", "cluster.accelerators": 2}, {"amd.com/gpu": "2"}),
        ({"cluster.accelerators": 0, "cluster.cpus": 1.5}, {}),
    ],
)
def test_a_node_has_an_accelerator_a_process_unless_told_otherwise(
    overrides: dict[str, Any], devices: dict[str, str]
) -> None:
    resources = build(overrides)["spec"]["trainer"]["resourcesPerNode"]
    assert resources.get("limits", {}) == devices
    assert resources["requests"].items() >= devices.items()


def test_what_is_said_of_one_step_is_what_its_nodes_are() -> None:
    own = {"image": "own", "memory_gb": 64, "accelerators": 4, "node_selector": {"zone": "b"}, "shm_gb": 8}
    many = {"cluster.nodes": 2, "cluster.memory_gb": 512, "cluster.image": "all", "cluster.steps": {"train": own}}
    manifest = build(many)
    trainer = manifest["spec"]["trainer"]
    assert trainer["image"] == "own"
    assert trainer["resourcesPerNode"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "4"}
    assert pod(manifest)["nodeSelector"] == {"zone": "b"}
    assert pod(manifest)["volumes"][0]["emptyDir"]["sizeLimit"] == "8Gi"
    targets = Work("targets", "teefusion.target_sets", {"prompts": "/shared/p", "output": "s3://bucket/t"})
    assert build(many, targets)["spec"]["trainer"]["image"] == "all"


def test_downloads_go_to_the_volume_where_nothing_else_is_said() -> None:
    assert variables(build())["HF_HOME"] == "/shared/hub"
    assert "value" not in variables(build({"cluster.config_map_keys": ["HF_HOME"]}))["HF_HOME"]
    assert variables(build({"cluster.env": {"HF_HOME": "/shared/cache"}}))["HF_HOME"] == "/shared/cache"


def test_other_settings_give_another_digest() -> None:
    digests = {build({"cluster.image": image})["metadata"]["annotations"][DIGEST] for image in ("a", "a", "b")}
    assert len(digests) == 2


@pytest.mark.parametrize(
    ("overrides", "work", "message"),
    [
        ({"cluster.volume_claim": None, "cluster.volume_path": None}, {}, "workdir is /shared/work.*cannot see"),
        ({"workdir": Path("work")}, {}, "workdir is work, which is not on the shared volume at /shared"),
        ({}, {"output": "/home/me/out"}, "output is /home/me/out"),
        ({}, {"prompts": "/shared/../home"}, "prompts is /shared/../home"),
        ({"teacher.uri": "/models/sd3"}, {}, "teacher.uri is /models/sd3"),
        ({"teacher.uri": "/shared/sd3"}, {"targets": "file:///tmp/t"}, "targets is /tmp/t"),
    ],
)
def test_folders_that_pods_cannot_see_are_refused(
    overrides: dict[str, Any], work: dict[str, str], message: str
) -> None:
    chosen = Work("train", WORK.module, dict(WORK.arguments) | work)
    with pytest.raises(SettingsError, match=message):
        build(overrides, chosen)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"cluster.nodes": 3}, "batch_size .* is not divisible .* cluster.nodes 3 .* = 3"),
        ({"cluster.volume_path": None}, "come together"),
        ({"cluster.volume_path": "shared"}, "is not absolute"),
        ({"cluster.config_map": None, "cluster.config_map_keys": ["A"]}, "config_map_keys are keys of config_map"),
        ({"cluster.priority_class": "high"}, "takes a queue"),
        ({"cluster.env": {"PET_NNODES": "9"}}, "env sets PET_NNODES"),
        ({"cluster.env": {"HF_TOKEN": "x"}}, "env sets HF_TOKEN, which anyone could read"),
        ({"cluster.env": {"MLFLOW_TRACKING_USERNAME": "x"}}, "pods would get MLFLOW_TRACKING_USERNAME twice"),
        ({"cluster.config_map_keys": ["TEEFUSION_WORKDIR"]}, "pods would get TEEFUSION_WORKDIR twice"),
        ({"cluster.config_map_keys": ["A", "B"], "cluster.env": {"A": "x"}}, "pods would get A twice"),
        ({"cluster.tolerations": [{"operator": "Equal"}]}, "operator Equal takes a value"),
        ({"cluster.accelerator": "gpu"}, "cluster.accelerator"),
    ],
)
def test_settings_that_contradict_are_refused(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        settings(overrides)


def test_several_nodes_or_the_launcher_choose_a_trainjob() -> None:
    def chosen(**cluster: Any) -> tuple[bool, bool]:
        found = settings({f"cluster.{name}": value for name, value in cluster.items()}).cluster
        return found.takes_trainjob("train"), found.takes_trainjob("targets")

    assert chosen() == (False, False)
    assert chosen(nodes=2) == (True, True)
    assert chosen(target_nodes=2) == (False, True)
    assert chosen(nodes=2, target_nodes=1) == (True, False)
    assert chosen(nodes=2, launcher="here") == (False, False)
    assert chosen(launcher="trainjob") == (True, True)
