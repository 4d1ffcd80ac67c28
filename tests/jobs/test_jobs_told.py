"""What is told of a job while it runs: events, the log, restarts."""

from __future__ import annotations

import time

import pytest

from teefusion.errors import TrainingError
from tests.apiserver import ApiServer
from tests.jobs.plays import JOBS, completes, run, shown


def test_events_become_messages_each_once(server: ApiServer, messages: pytest.LogCaptureFixture) -> None:
    def play(api: ApiServer, name: str) -> None:
        pod = f"{name}-node-0-0-a"
        api.condition(name, "Suspended", "Suspended", "TrainJob is suspended")
        api.warn(f"{name}-node-0", "FailedCreate", "exceeded quota: gpus")
        for _ in range(3):
            api.warn(pod, "FailedScheduling", "0/3 nodes are available: 3 Insufficient nvidia.com/gpu.")
        api.warn(pod, "Failed", "Error: ErrImagePull")
        api.warn("somebody-elses-pod", "FailedScheduling", "not ours")
        api.warn(f"{name}9-node-0-0-a", "FailedScheduling", "not ours")
        time.sleep(0.5)
        completes(api, name)

    server.plays = [play]
    name = run(server)
    text = messages.text
    assert text.count("FailedScheduling: 0/3 nodes are available") == 1
    assert text.count(f"{name}-node-0-0-a: Failed: Error: ErrImagePull") == 1
    assert text.count("FailedCreate: exceeded quota: gpus") == 1
    assert text.count("while it waits in a queue: TrainJob is suspended") == 1
    assert "not ours" not in text


def test_a_job_that_does_not_start_in_time_is_deleted_with_the_reason(server: ApiServer) -> None:
    server.plays = [lambda api, name: api.warn(f"{name}-node-0-0-a", "FailedScheduling", "0/3 nodes")]
    with pytest.raises(TrainingError, match=r"did not start .* in 0.5 s .*last warning was: FailedScheduling: 0/3"):
        run(server, start_timeout_s=0.5)
    assert server.count("DELETE", JOBS.replace("(", "/teefusion.*(")) == 1


def test_a_started_job_may_take_as_long_as_it_likes(server: ApiServer) -> None:
    def play(api: ApiServer, name: str) -> None:
        api.start(name, nodes=2)
        time.sleep(0.8)
        api.end(f"{name}-node-0-0-a")
        api.condition(name, "Complete")

    server.plays = [play]
    run(server, start_timeout_s=0.4)
    assert server.count("POST", JOBS) == 1


def test_the_log_goes_on_after_a_broken_stream_without_a_line_twice(
    server: ApiServer, messages: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teefusion.joblogs._RETRY_S", 0.05)
    server.log_breaks_after, server.plays = 1, [completes]
    run(server)
    assert shown(messages) == ["step 1", "step 2", "saved"]
    assert server.count("GET", "sinceSeconds=") >= 1


def test_a_restarted_jobs_new_pod_is_followed(server: ApiServer, messages: pytest.LogCaptureFixture) -> None:
    def play(api: ApiServer, name: str) -> None:
        api.start(name, attempt="a")
        api.say(f"{name}-node-0-0-a", "first attempt")
        time.sleep(0.4)
        api.end(f"{name}-node-0-0-a", code=1)
        api.start(name, attempt="b")
        api.say(f"{name}-node-0-0-b", "second attempt")
        time.sleep(0.4)
        api.end(f"{name}-node-0-0-b")
        api.condition(name, "Complete")

    server.plays = [play]
    run(server)
    assert shown(messages) == ["first attempt", "second attempt"]
    assert any("starts again, from its last checkpoint" in message for message in messages.messages)
