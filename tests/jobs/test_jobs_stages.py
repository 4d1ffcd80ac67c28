"""Stages as TrainJobs, by a double whose pods really run: what they make, and what their end tells."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from teefusion import launch
from teefusion.errors import SettingsError, TrainingError
from teefusion.files import read_json, write_json
from teefusion.manifests import read_manifest
from teefusion.settings import Settings
from teefusion.stages.ingest import ingest
from teefusion.stages.targets import targets
from teefusion.stages.train import train
from teefusion.storage import FolderStore
from tests.apiserver import ApiServer
from tests.jobs.plays import completes, shown
from tests.s3 import free_port


def test_training_returns_the_record_that_the_pods_wrote(server: ApiServer, shared: Settings, tmp_path: Path) -> None:
    def play(api: ApiServer, name: str) -> None:
        (output,) = [
            argument.removeprefix("--output=")
            for argument in api.jobs[name]["spec"]["trainer"]["args"]
            if argument.startswith("--output=")
        ]
        completes(api, name)
        time.sleep(0.5)  # a network file system shows it later
        write_json(Path(output) / "training.json", {"steps": 6})

    server.plays = [play]
    output = tmp_path / "work" / "students" / "S"
    record = launch.run_training(shared, prompts=tmp_path / "p", targets="s3://bucket/t", output=output)
    assert record == {"steps": 6}


def test_a_complete_job_whose_output_is_not_here_is_told(
    server: ApiServer, shared: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "_PUBLISHED_PATIENCE_S", 0.1)
    server.plays = [completes]
    with pytest.raises(TrainingError, match=r"is complete, but .*manifest.json is not here. Mount the same volume"):
        launch.run_targets(shared, prompts=tmp_path / "p", output=str(tmp_path / "targets"))


def test_targets_in_s3_need_nothing_here(server: ApiServer, shared: Settings, tmp_path: Path) -> None:
    server.plays = [completes]
    launch.run_targets(shared, prompts=tmp_path / "p", output="s3://bucket/t")
    assert not server.plays


def test_folders_of_this_machine_are_refused_before_anything_is_asked(
    server: ApiServer, shared: Settings, tmp_path: Path
) -> None:
    alone = shared.cluster.model_copy(update={"volume_claim": None, "volume_path": None})
    with pytest.raises(SettingsError, match=r"which the pods of a TrainJob cannot see. Set cluster.volume_claim"):
        launch.run_targets(shared.model_copy(update={"cluster": alone}), prompts=tmp_path / "p", output="s3://bucket/t")
    assert not server.requests


class Pods:
    """Runs what a job's manifest says, a process a node, as Trainer's torch policy would start it."""

    def __call__(self, server: ApiServer, name: str) -> None:
        trainer = server.jobs[name]["spec"]["trainer"]
        assert trainer["command"] == ["torchrun"]
        server.start(name, nodes=trainer["numNodes"])
        port = str(free_port())
        nodes = [self._node(trainer, node, port) for node in range(trainer["numNodes"])]
        outputs = [node.communicate(timeout=240)[0] for node in nodes]
        for node, (process, output) in enumerate(zip(nodes, outputs, strict=True)):
            server.say(f"{name}-node-0-{node}-a", *output.splitlines())
            server.end(f"{name}-node-0-{node}-a", code=process.returncode)
        failed = any(process.returncode for process in nodes)
        server.condition(name, "Failed" if failed else "Complete")

    def _node(self, trainer: dict[str, Any], node: int, port: str) -> subprocess.Popen[str]:
        """One node, with the variables that tell torchrun where it is."""
        pet = {
            "PET_NNODES": str(trainer["numNodes"]),
            "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
            "PET_NODE_RANK": str(node),
            "PET_MASTER_ADDR": "127.0.0.1",
            "PET_MASTER_PORT": port,
        }
        # No Secret is there, and the variables of one that may be missing are left out.
        assert all("value" in entry or entry["valueFrom"]["secretKeyRef"]["optional"] for entry in trainer["env"])
        variables = {entry["name"]: entry["value"].replace("$$", "$") for entry in trainer["env"] if "value" in entry}
        return subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *trainer["args"]],
            env=os.environ | pet | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


@pytest.mark.slow
def test_stages_on_two_nodes_make_what_one_process_makes(
    server: ApiServer,
    make_settings: Callable[..., Settings],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    messages: pytest.LogCaptureFixture,
) -> None:
    config = str(server.kubeconfig(tmp_path / "config"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", config)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shared = {"cluster.volume_claim": "claim", "cluster.volume_path": str(tmp_path_factory.getbasetemp())}
    here = make_settings()
    there = make_settings({"workdir": tmp_path / "there", "cluster.nodes": 2, "cluster.poll_s": 0.5, **shared})
    assert here.run_key == there.run_key
    server.plays = [Pods(), Pods()]
    records = {}
    for run in (here, there):
        prompts = Path(ingest(run).output)
        made = targets(run, prompts)
        assert not made.reused
        student = train(run, prompts, made.output)
        record = read_json(Path(student.output) / "training.json")
        records[run.workdir.name] = (read_manifest(FolderStore(Path(made.output))), record)
    (alone, one), (many, two) = records["work"], records["there"]
    assert many == alone
    assert (one["ranks"], two["ranks"]) == (1, 2)
    assert two["guidance_residual"] == pytest.approx(one["guidance_residual"], rel=1e-3)
    assert not server.plays
    assert any("train: 6/6 step" in line for line in shown(messages))


@pytest.mark.slow
def test_what_a_rank_says_when_it_fails_is_in_the_error(
    server: ApiServer, make_settings: Callable[..., Settings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = str(server.kubeconfig(tmp_path / "config"))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", config)
    chosen = make_settings(
        {
            "cluster.launcher": "trainjob",
            "cluster.volume_claim": "claim",
            "cluster.volume_path": "/",
            "cluster.poll_s": 0.5,
        }
    )
    server.plays = [Pods()]
    with pytest.raises(
        TrainingError, match=r"node-0-0-a ended with exit code 1 \(Error\); its last lines:\n"
    ) as caught:
        launch.run_training(chosen, prompts=tmp_path / "p", targets=str(tmp_path / "none"), output=tmp_path / "out")
    assert "is no finished target set: manifest.json is missing. Run 'teefusion targets' first." in str(caught.value)
    assert "ChildFailedError" not in str(caught.value)
