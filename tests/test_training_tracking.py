"""What training leaves in MLflow: parameters, curves and pictures."""

from __future__ import annotations

import pytest

from teefusion.prompts import load_prompt_set
from teefusion.students import load_student
from tests.training_job import Job, assert_equal, assert_shown, logged_pictures, tracked_run


def test_the_run_is_in_mlflow_with_parameters_curves_and_pictures(job: Job) -> None:
    job.train("run")
    client, run = tracked_run(job.make())
    assert run.data.params["train.steps"] == "6"
    assert {"train/loss", "heldout/guidance_residual", "guidance_residual"} <= run.data.metrics.keys()
    assert {"train/grad_norm", "train/learning_rate", "train/states_per_second"} <= run.data.metrics.keys()
    assert any(name.startswith("heldout/residual_sigma_") for name in run.data.metrics)
    assert 0 <= run.data.metrics["train/data_wait_share"] < 1
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "heldout/guidance_residual")]
    assert steps == [0, 3, 6]
    first = load_prompt_set(job.prompts).heldout[0].text
    assert run.data.params["samples.1"] == first
    assert list(logged_pictures(job.make())) == ["samples.png"]


def test_a_run_that_is_named_in_the_environment_is_adopted(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    from teefusion.tracking import connect

    client = connect(job.make())
    mine = client.create_run(client.create_experiment("mine")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", mine)
    job.train("run")
    assert "guidance_residual" in client.get_run(mine).data.metrics
    assert client.get_experiment_by_name("teefusion") is None


@pytest.mark.parametrize("lora_rank", [None, 2])
def test_sheets_of_samples_are_drawn_while_training_and_change_nothing(job: Job, lora_rank: int | None) -> None:
    values = {"train.learning_rate": 1e-2, "train.ema_decay": 0.5, "train.lora_rank": lora_rank}
    job.train("without", values)
    job.train("with", values | {"train.sample_every": 2})
    assert_equal(job.weights("without"), job.weights("with"))
    sheets = logged_pictures(job.make(values))
    assert sorted(sheets) == ["samples.png", "samples/step-00000002.png", "samples/step-00000004.png"]
    assert len({sheet.tobytes() for sheet in sheets.values()}) == 3
    assert_shown(sheets["samples.png"], load_student(job.folder / "with" / "student"), job)
