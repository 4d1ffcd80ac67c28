"""The options that stand for a setting, and which of them go together."""

from __future__ import annotations

from typing import Any

# Flags that are called otherwise than their option, because two commands mean different settings by them.
FLAGS = {"target-batch-size": "batch-size"}
# Options that stand for a setting: (dotted key, type, help) by name.
SETTING_OPTIONS: dict[str, tuple[str, Any, str]] = {
    "teacher": ("teacher.name", str, "Preset, diffusers folder or hub id of the teacher.  [default: shapes]"),
    "revision": ("teacher.revision", str, "Hub commit of the teacher, or digest of its folder."),
    "prompts": ("prompts.source", str, "A .txt, .json, .jsonl, .csv or .parquet file.  [default: the preset's]"),
    "strategy": ("strategy.name", str, "How the teacher samples: euler_cfg, z_sampling or w2sd.  [default: euler_cfg]"),
    "num-steps": ("strategy.num_steps", int, "Steps of the teacher's sampling grid."),
    "guidance-min": ("strategy.guidance_min", float, "Smallest guidance scale taught (diffusers' s)."),
    "guidance-max": ("strategy.guidance_max", float, "Largest guidance scale taught (diffusers' s)."),
    "trajectories": ("targets.trajectories", int, "Teacher trajectories to store."),
    "storage": ("storage.uri", str, "Where target sets are kept: a folder or s3://bucket/prefix.  [default: workdir]"),
    "target-batch-size": ("targets.batch_size", str, "Trajectories sampled together, or auto."),
    "workers": ("targets.num_processes", int, "Target workers on this machine, one a GPU."),
    "fusion": ("fusion.variant", str, "Fused term: affine, balanced, paper, published, ...  [default: affine]"),
    "student-steps": ("student.num_steps", int, "Steps the student samples in.  [default: the teacher's]"),
    "steps": ("train.steps", int, "Optimizer steps."),
    "batch-size": ("train.batch_size", int, "States an optimizer step, over all ranks."),
    "learning-rate": ("train.learning_rate", float, "Peak learning rate."),
    "processes": ("train.num_processes", int, "Training ranks on this machine."),
    "guidance-scale": ("evaluate.guidance_scale", float, "Guidance of teacher and student in the comparison."),
    "scorer": (
        "evaluate.scorer",
        str,
        "hps:FILE, clip:FOLDER, pickscore:FOLDER, or a CLIP folder.  [default: the preset's]",
    ),
    "model-name": ("mlflow.model_name", str, "Registered model.  [default: teefusion-TEACHER]"),
    "tracking-uri": ("mlflow.tracking_uri", str, "MLflow server.  [default: SQLite in the workdir]"),
    "host": ("serve.host", str, "Address to listen on; 0.0.0.0 is every one of this machine.  [default: 127.0.0.1]"),
    "port": ("serve.port", int, "Port to listen on; 0 takes a free one.  [default: 8000]"),
    "device": ("device", str, "auto, cpu, cuda, cuda:1, ...  [default: auto]"),
    "endpoint": (
        "kfp.host",
        str,
        "Kubeflow Pipelines.  [default: KF_PIPELINES_ENDPOINT, else the kubeconfig's]",
    ),
}


TEACHER = (
    *("teacher", "revision", "prompts", "strategy", "num-steps", "guidance-min", "guidance-max", "trajectories"),
    "storage",
)
TARGETS = (*TEACHER, "target-batch-size", "workers", "device")
TRAIN = ("fusion", "student-steps", "steps", "batch-size", "learning-rate", "processes")
EVALUATE = ("guidance-scale", "scorer")
REGISTRY = ("model-name", "tracking-uri")
RUN = (*TEACHER, *TRAIN, *EVALUATE, *REGISTRY, "device")
