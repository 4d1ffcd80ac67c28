"""Run a stage's work here, under torchrun where it takes more processes, or as a TrainJob where it takes more nodes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from teefusion.errors import InterruptedRunError, SettingsError, TeEFusionError, TrainingError
from teefusion.files import read_json, write_bytes
from teefusion.manifests import MANIFEST
from teefusion.settings import JobStage, Settings
from teefusion.stopping import terminable
from teefusion.storage import is_remote, local_path

_PUBLISHED_PATIENCE_S = 90.0  # network file systems may remember for a minute that a file was missing


def run_training(
    settings: Settings, *, prompts: Path, targets: str, output: Path, dry_run: bool = False
) -> dict[str, Any]:
    """Train and return the record: in this process, by ``torchrun --standalone`` (ZeRO always), or as a TrainJob.

    ``dry_run`` takes a few steps and returns what ``training.dry_run`` does; not as a TrainJob.

    Raises what ``training.train`` raises; from torchrun, TrainingError naming the exit code, and InterruptedRunError
    once its ranks have ended after SIGTERM; from a TrainJob what ``jobs.run_job`` raises, and SettingsError where its
    pods could not reach the folders.
    """
    if settings.cluster.takes_trainjob("train"):
        if dry_run:
            raise SettingsError(
                "A dry run is not made as a TrainJob. Run it on one such node with --set cluster.launcher=here, and "
                "train.num_processes its devices."
            )
        paths = {"prompts": str(prompts), "targets": targets, "output": str(output)}
        _trainjob(settings, "train", "teefusion.training", paths)
        return _published_record(output / "training.json")
    if settings.train.num_processes == 1 and settings.train.zero_stage == 0:
        from teefusion import training

        work = training.dry_run if dry_run else training.train
        return work(settings, prompts=prompts, targets=targets, output=output)
    if settings.train.zero_stage:
        from teefusion.zero import require_deepspeed

        require_deepspeed(settings.train)  # before each rank says it
    arguments = [f"--prompts={prompts}", f"--targets={targets}", f"--output={output}"]
    arguments += ["--dry-run"] if dry_run else []
    restarts = 0 if dry_run else settings.train.max_restarts
    try:
        code = _torchrun(settings, settings.train.num_processes, "teefusion.training", arguments, restarts=restarts)
    except SystemExit as stopped:
        raise InterruptedRunError(
            f"Training was told to stop. Its ranks leave a checkpoint in {output / 'checkpoints'}: run the same "
            "command again to continue from it."
        ) from stopped
    if code:
        raise TrainingError(f"Training under torchrun ended with exit code {code}; the reason is above.")
    record: dict[str, Any] = read_json(output / ("dry-run.json" if dry_run else "training.json"))
    return record


def run_targets(settings: Settings, *, prompts: Path, output: str) -> None:
    """Make a target set: in this process, under ``torchrun --standalone``, or as a TrainJob.

    Raises what ``target_sets.generate_tracked`` raises; from torchrun, TeEFusionError naming the exit code; from a
    TrainJob as ``run_training``.
    """
    if settings.cluster.takes_trainjob("targets"):
        _trainjob(settings, "targets", "teefusion.target_sets", {"prompts": str(prompts), "output": output})
        if not is_remote(output):
            _published_record(local_path(output) / MANIFEST)
        return
    if settings.targets.num_processes == 1:
        from teefusion.prompts import load_prompt_set
        from teefusion.storage import open_store
        from teefusion.target_sets import generate_tracked

        generate_tracked(settings, load_prompt_set(prompts), open_store(output, settings.storage))
        return
    arguments = [f"--prompts={prompts}", f"--output={output}"]
    code = _torchrun(settings, settings.targets.num_processes, "teefusion.target_sets", arguments)
    if code:
        raise TeEFusionError(
            f"Making targets under torchrun ended with exit code {code}; the reason is above. Finished shards are kept."
        )


def run_scoring(settings: Settings, module: str, paths: dict[str, Path]) -> None:
    """Have several processes score an evaluation's pictures; with one there is nothing to do before the caller does.

    ``module`` records scores where its caller then finds them. Raises TeEFusionError naming torchrun's exit code.
    """
    if settings.evaluate.num_processes == 1:
        return
    arguments = [f"--{name}={path}" for name, path in paths.items()]
    code = _torchrun(settings, settings.evaluate.num_processes, module, arguments)
    if code:
        raise TeEFusionError(
            f"Scoring under torchrun ended with exit code {code}; the reason is above. Scored batches are kept."
        )


def _torchrun(settings: Settings, processes: int, module: str, arguments: list[str], *, restarts: int = 0) -> int:
    """The exit code. All ranks start again when one dies, ``restarts`` times at most.

    What they print goes to standard error: standard output is the command's result.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "settings.json"
        write_bytes(file, settings.to_json().encode())
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [f"--max-restarts={restarts}", "-m", module, f"--settings={file}", *arguments]
        # Else the ranks of a restart meet in the store of those before them, and gloo dials addresses of the dead.
        environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with terminable(), subprocess.Popen(command, stdout=sys.stderr, env=environment) as process:
            try:
                return process.wait()
            except BaseException:  # told to stop: torchrun tells the ranks, and is waited for
                process.terminate()
                raise


def _trainjob(settings: Settings, stage: JobStage, module: str, paths: dict[str, str]) -> None:
    """Run the module's ``main`` on every node; pods start in another directory, so paths become absolute."""
    from teefusion.trainjobs import Work, build_trainjob, require_reachable

    arguments = {name: uri if is_remote(uri) else str(local_path(uri).absolute()) for name, uri in paths.items()}
    settings = settings.model_copy(update={"workdir": settings.workdir.absolute()})
    work = Work(stage, module, arguments)
    require_reachable(settings, work)  # before anything is asked of a cluster

    from teefusion.cluster import Cluster
    from teefusion.jobs import run_job

    cluster = Cluster(settings.cluster)
    run_job(cluster, build_trainjob(settings, work, namespace=cluster.namespace, owner=cluster.owner()))


def _published_record(path: Path) -> dict[str, Any]:
    """What a completed job wrote last, once this machine sees it too. Raises TrainingError if it never does."""
    end = time.monotonic() + _PUBLISHED_PATIENCE_S
    while not path.exists():
        if time.monotonic() > end:
            raise TrainingError(
                f"The TrainJob is complete, but {path} is not here. Mount the same volume here and in its pods "
                "(cluster.volume_claim, cluster.volume_path), then run again."
            )
        time.sleep(1.0)
    record: dict[str, Any] = read_json(path)
    return record
