"""The pipeline: prompts -> targets -> student -> evaluation -> gate -> registry, and a summary whatever happens.

No ``from __future__ import annotations`` here: kfp 2.17 fails to compile with it.
"""

from kfp import dsl

from teefusion.components.evaluate import evaluate
from teefusion.components.ingest import ingest
from teefusion.components.register import register
from teefusion.components.summarize import summarize
from teefusion.components.targets import targets
from teefusion.components.train import train


@dsl.pipeline(name="teefusion-distill", description="Distil a guided text-to-image teacher into a one-forward student.")
def distill(settings: str):  # type: ignore[no-untyped-def, type-arg]  # kfp reads a return annotation as an output
    """One run, described by its pinned settings (see `teefusion compile`)."""
    summary = summarize(settings=settings).set_display_name("Summary")
    with dsl.ExitHandler(summary, name="Distil"):
        prompts = ingest(settings=settings).set_display_name("Ingest prompts")
        made = targets(settings=settings, prompts=prompts.output).set_display_name("Teacher targets")
        student = train(settings=settings, prompts=prompts.output, targets=made.output).set_display_name(
            "Train student"
        )
        compared = evaluate(settings=settings, prompts=prompts.output, student=student.output)
        compared.set_display_name("Evaluate and gate")
        # The stages keep their own results by content; KFP's cache would hide a changed image or registry.
        for task in (prompts, made, student, compared, summary):
            task.set_caching_options(False)
        # kfp.local resolves a condition inside an exit handler only where the output is the returned value.
        with dsl.If(compared.outputs["Output"] == True, name="Gate passed"):  # noqa: E712  # kfp overloads ==
            registered = register(settings=settings, student=student.output, evaluation=compared.outputs["evaluation"])
            registered.set_display_name("Register challenger").set_caching_options(False)
