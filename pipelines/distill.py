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
    workers = _target_workers(settings) if settings.targets.shard_groups > 1 else None

    # preflight and summarize repeat these parameters: kfp reads each signature by itself, an exit task may take no
    # other task's output, and kfp.local 2.17 breaks off (JSONDecodeError) over parameters inside a dict.
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
        del given["cluster_settings"], given["workers"]
        summary = place(summarize(**given), "summarize", "Summary", cluster_settings)
        with dsl.ExitHandler(summary, name="Distil"):
            checked = place(preflight(**given), "preflight", "Preflight", cluster_settings)
            _stages(checked.outputs["Output"], workers, cluster_settings)

    return distill


def _stages(run, workers, settings: Settings):  # type: ignore[no-untyped-def]
    """The five stages of a run, whose settings are the output ``run``; ``workers`` make the targets if there are."""
    prompts = place(ingest(settings=run), "ingest", "Ingest prompts", settings).outputs["Output"]
    made = targets(settings=run, prompts=prompts)
    if workers is None:
        place(made, "targets", "Teacher targets", settings)
    else:  # it finds all of it there and says where, for which a pod like that of ingest does
        shared = workers(settings=run, prompts=prompts).set_display_name("Teacher targets")
        place(made, "ingest", "Target set", settings).after(shared)
    trained = train(settings=run, prompts=prompts, targets=made.outputs["Output"])
    student = place(trained, "train", "Train student", settings).outputs["Output"]
    compared = evaluate(settings=run, prompts=prompts, student=student)
    place(compared, "evaluate", "Evaluate and gate", settings)
    # kfp.local resolves a condition inside an exit handler only where the output is the returned value.
    with dsl.If(compared.outputs["Output"] == True, name="Gate passed"):  # noqa: E712  # kfp overloads ==
        registered = register(settings=run, student=student, evaluation=compared.outputs["evaluation"])
        place(registered, "register", "Register challenger", settings)


def _target_workers(settings: Settings):  # type: ignore[no-untyped-def]
    """Alike tasks without a word to each other: workers share a set by claims, and each ends when all of it is there.

    A pipeline of its own, as kfp.local 2.17 gives a loop its item in place of every output of a task before it
    (``create_parameter_loop_iteration_task_spec``), and leaves parameters alone.
    """
    cluster_settings, options = settings, settings.targets

    @dsl.pipeline(name="target-workers")
    def target_workers(settings: str, prompts: str):  # type: ignore[no-untyped-def]
        with dsl.ParallelFor(list(range(options.shard_groups)), name="Workers", parallelism=options.parallel_groups):
            place(targets(settings=settings, prompts=prompts), "targets", "Worker", cluster_settings)

    return target_workers
