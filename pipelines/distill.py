"""The pipeline: preflight, prompts -> targets -> student -> evaluation -> gate -> registry, and whatever happens, a
summary.

No ``from __future__ import annotations`` here: kfp 2.17 fails to compile with it.
"""

from kfp import dsl

from teefusion.components.evaluate import evaluate
from teefusion.components.ingest import ingest
from teefusion.components.preflight import preflight
from teefusion.components.register import register
from teefusion.components.summarize import summarize
from teefusion.components.targets import targets
from teefusion.components.train import train
from teefusion.pipelines.platform import place
from teefusion.settings import Settings

DESCRIPTION = "Distil a guided text-to-image teacher into a student of one forward a step."


def make_pipeline(settings: Settings):  # type: ignore[no-untyped-def]  # kfp's classes have no types
    """The pipeline for the cluster of these settings: its pods, and how many make targets. The rest are parameters."""
    cluster_settings = settings

    @dsl.pipeline(name=settings.kfp.pipeline, description=DESCRIPTION)
    def distill(  # type: ignore[no-untyped-def]  # kfp reads a return annotation as an output
        settings: str,
        teacher: str,
        teacher_uri: str,
        teacher_revision: str,
        prompts: str,
        strategy: str,
        guidance_min: float,
        guidance_max: float,
        student: dict,  # type: ignore[type-arg]
        fusion: dict,  # type: ignore[type-arg]
        train_steps: int,
        gate: dict,  # type: ignore[type-arg]
    ):
        given = dict(locals())
        given.pop("cluster_settings")
        summary = place(summarize(**given), "summarize", "Summary", cluster_settings)
        with dsl.ExitHandler(summary, name="Distil"):
            checked = place(preflight(**given), "preflight", "Preflight", cluster_settings)
            _stages(checked.outputs["Output"], cluster_settings)

    return distill


def _stages(run, settings: Settings):  # type: ignore[no-untyped-def]
    """The five stages of a run, whose settings are the output ``run``."""
    prompts = place(ingest(settings=run), "ingest", "Ingest prompts", settings)
    count = settings.targets.shard_groups
    names = ["Teacher targets"] if count == 1 else [f"Teacher targets, {k + 1} of {count}" for k in range(count)]
    # Alike, and without a word to each other: workers share a set by claims, and each ends when all of it is there.
    workers = [place(targets(settings=run, prompts=prompts.output), "targets", name, settings) for name in names]
    trained = train(settings=run, prompts=prompts.output, targets=workers[0].output).after(*workers)
    student = place(trained, "train", "Train student", settings).outputs["Output"]
    compared = evaluate(settings=run, prompts=prompts.output, student=student)
    place(compared, "evaluate", "Evaluate and gate", settings)
    # kfp.local resolves a condition inside an exit handler only where the output is the returned value.
    with dsl.If(compared.outputs["Output"] == True, name="Gate passed"):  # noqa: E712  # kfp overloads ==
        registered = register(settings=run, student=student, evaluation=compared.outputs["evaluation"])
        place(registered, "register", "Register challenger", settings)
