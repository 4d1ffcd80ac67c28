"""What a preflight finds, in one go and in words, and what it costs: no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from teefusion import footprints, teacher_files
from teefusion.errors import PipelineError, PreflightError, TeacherError
from teefusion.estimates import estimate_targets
from teefusion.families import FAMILIES
from teefusion.footprints import footprint
from teefusion.preflight import Finding, preflight, require_ready, to_markdown
from teefusion.settings import Settings, TeacherSettings, load_settings
from teefusion.teacher_files import TRANSFORMERS, TeacherFiles
from tests.apiserver import NAMESPACE, ApiServer
from tests.s3 import BUCKET, ENVIRONMENT, free_port, s3_server

Make = Callable[..., Settings]


def wrong(settings: Settings) -> dict[str, str]:
    """What is wrong, by check."""
    _, findings = preflight(settings)
    return {finding.check: finding.text for finding in findings if finding.error}


def test_a_run_that_can_go_well_is_pinned(make_settings: Make) -> None:
    settings = make_settings()
    loose = settings.model_copy(update={"teacher": settings.teacher.model_copy(update={"revision": None})})
    pinned, findings = preflight(loose)
    assert pinned == settings
    require_ready(findings)
    assert [finding.check for finding in findings] == [
        *("workdir", "teacher", "disk", "accelerator memory", "prompts", "scorer")
    ]
    assert list(settings.workdir.iterdir()) == []


def test_everything_wrong_is_told_at_once_with_the_setting_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    broken = load_settings(
        overrides={
            "workdir": tmp_path / "work",
            "teacher.uri": str(tmp_path / "nothing"),
            "prompts.source": str(tmp_path / "none.txt"),
            "evaluate.scorer": str(tmp_path / "no-scorer"),
            "storage.uri": f"s3://{BUCKET}/sets",
            "storage.endpoint_url": f"http://127.0.0.1:{free_port()}",
            "mlflow.tracking_uri": f"http://127.0.0.1:{free_port()}",
        }
    )
    _, findings = preflight(broken)
    with pytest.raises(PipelineError) as raised:
        require_ready(findings)
    told = str(raised.value)
    assert told.startswith("5 problems found before anything was spent:")
    for name in ("teacher.uri", "none.txt", "evaluate.scorer", "storage.endpoint_url", "mlflow.tracking_uri"):
        assert name in told


def test_a_wrong_request_is_exit_code_2_and_a_service_that_is_away_is_1() -> None:
    mistake = Finding("teacher", "t", TeacherError("t"))
    away = Finding("mlflow", "m", PipelineError("m"))
    with pytest.raises(PreflightError, match="1 problem found"):
        require_ready([mistake])
    with pytest.raises(PipelineError, match="2 problems found"):
        require_ready([mistake, away])
    lines = to_markdown([Finding("disk", "a | b"), mistake]).splitlines()
    assert lines[2:] == ["| teacher | **wrong** | t |", "| disk | well | a / b |"]


def test_a_step_on_a_cluster_refuses_a_workdir_that_the_next_step_would_not_see(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KFP_POD_NAME", "step")
    assert "is in this pod alone" in wrong(make_settings())["workdir"]
    shared = {"cluster.volume_claim": "work", "cluster.volume_path": str(tmp_path)}
    assert wrong(make_settings(shared)) == {}


def test_a_teacher_without_weights_or_of_another_family_is_refused(tiny_teacher: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(tiny_teacher, tmp_path / "teacher")
    found = teacher_files.teacher_files(TeacherSettings(uri=str(copy)))
    assert found.transformer == "SD3Transformer2DModel"
    (copy / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(TeacherError, match="there are no safetensors files of vae"):
        teacher_files.teacher_files(TeacherSettings(uri=str(copy)))
    index = json.loads((copy / "model_index.json").read_text())
    index["transformer"][1] = "PixArtTransformer2DModel"
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(TeacherError, match="PixArtTransformer2DModel, which cannot be fused"):
        teacher_files.teacher_files(TeacherSettings(uri=str(copy)))


def test_the_known_families_are_those_that_can_be_fused() -> None:
    assert FAMILIES.keys() == TRANSFORMERS


def test_parameters_are_counted_from_the_headers_alone(tiny_teacher: Path) -> None:
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_pretrained(tiny_teacher, subfolder="transformer")
    saved = {name: value.numel() for name, value in model.state_dict().items()}
    assert teacher_files.teacher_files(TeacherSettings(uri=str(tiny_teacher))).parameters == sum(saved.values())


@pytest.mark.parametrize("teacher", ["sd3-medium", "sd3.5-large", "flux.1-schnell"])
def test_the_disk_that_targets_take_is_that_of_the_full_estimate_without_what_is_small(teacher: str) -> None:
    settings = load_settings(overrides={"teacher.name": teacher})
    configs = Path(footprints.__file__).parent / "presets" / "architectures" / f"{teacher}.json"
    config = json.loads(configs.read_text())
    files = TeacherFiles(config["transformer/config.json"]["_class_name"], config["transformer/config.json"], 8, 1)
    assert footprint(settings, files).targets_disk == pytest.approx(
        estimate_targets(settings, "H200").states_bytes, rel=0.001
    )


def test_memory_of_training_is_shared_as_zero_shares_it() -> None:
    files = TeacherFiles("SD3Transformer2DModel", {"in_channels": 16, "sample_size": 128}, 8, 10**9)

    def gigabytes(**train: Any) -> float:
        overrides = {"train.batch_size": 64, "train.num_processes": 4, "train.precision": "bfloat16"}
        settings = load_settings(overrides=overrides | {f"train.{key}": value for key, value in train.items()})
        return footprint(settings, files).training_memory / 1e9

    # Weights 4, gradients 4, Adam 8, average 4; under ZeRO weights 2, gradients 2, masters 4, Adam 8, average 4.
    assert gigabytes() == 20
    assert gigabytes(zero_stage=1) == 2 + 2 + 16 / 4
    assert gigabytes(zero_stage=2) == 2 + 2 / 4 + 16 / 4
    assert gigabytes(zero_stage=3) == (2 + 2 + 16) / 4
    assert gigabytes(zero_stage=3, offload=True) == (2 + 4) / 4


def test_what_does_not_fit_is_refused(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("teefusion.preflight.free_bytes", lambda _: 1000)
    found = wrong(make_settings({"device": "cuda", "cluster.accelerator_memory_gb": 1e-5}))
    assert found.keys() == {"disk", "accelerator memory"}
    assert "1 kB free" in found["disk"]
    stored = make_settings().workdir / "targets" / "key"
    stored.mkdir(parents=True)
    (stored / "shard").write_bytes(bytes(10**7))
    assert "disk" not in wrong(make_settings())
    assert "train.zero_stage" in found["accelerator memory"]


def test_storage_is_written_and_read(make_settings: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with s3_server() as url:
        options = {"storage.endpoint_url": url, "storage.addressing_style": "path"}
        assert wrong(make_settings(options | {"storage.uri": f"s3://{BUCKET}/sets"})) == {}
        assert "The bucket does not exist" in wrong(make_settings(options | {"storage.uri": "s3://no/sets"}))["storage"]


@pytest.fixture
def mlflow() -> Iterator[tuple[str, list[tuple[str, str]], dict[str, tuple[int, str]]]]:
    """URL of what answers as MLflow does, its requests, and what it answers, by the end of the path."""
    requests: list[tuple[str, str]] = []
    answers: dict[str, tuple[int, str]] = {"health": (200, "OK")}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name = self.path.partition("?")[0].rpartition("/")[2]
            requests.append((name, self.headers.get("Authorization", "")))
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, text = answers.get(name, (200, "{}"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", requests, answers
    server.shutdown()
    server.server_close()


def test_mlflow_is_asked_to_write_with_these_credentials(
    make_settings: Make, monkeypatch: pytest.MonkeyPatch, mlflow: Any
) -> None:
    url, requests, answers = mlflow
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "u")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "p")
    settings = make_settings({"mlflow.tracking_uri": url})
    answers["get-by-name"] = (404, '{"error_code": "RESOURCE_DOES_NOT_EXIST"}')
    assert wrong(settings) == {}
    assert requests[-1] == ("create", "Basic dTpw")
    answers["get-by-name"] = (200, '{"experiment": {"experiment_id": "7"}}')
    assert wrong(settings) == {}
    assert requests[-1][0] == "set-experiment-tag"
    answers["set-experiment-tag"] = (403, "Permission denied")
    assert "MLFLOW_TRACKING_PASSWORD" in wrong(settings)["mlflow"]
    answers["get-by-name"] = (403, "Invalid Host header - possible DNS rebinding attack detected")
    assert "--allowed-hosts" in wrong(settings)["mlflow"]


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ApiServer]:
    with ApiServer() as server:
        monkeypatch.setenv("KUBECONFIG", str(server.kubeconfig(tmp_path / "kubeconfig")))
        yield server


def test_rights_and_runtime_of_trainjobs_are_checked(make_settings: Make, cluster: ApiServer, tmp_path: Path) -> None:
    volume = {"cluster.volume_claim": "work", "cluster.volume_path": str(tmp_path)}
    settings = make_settings({"cluster.nodes": 2, "cluster.namespace": NAMESPACE} | volume)
    assert wrong(settings) == {}
    cluster.forbidden = {("create", "trainjobs"), ("get", "pods/log")}
    told = wrong(settings)["trainjobs"]
    assert f"may not create trainjobs, get pods/log in namespace {NAMESPACE}" in told
    cluster.runtimes = set()
    found = wrong(settings)  # both at once
    assert found.keys() == {"trainjobs", "training runtime"}
    assert "There is no TrainingRuntime 'teefusion-torch'" in found["training runtime"]


class _Gated:
    """The hub, of a model whose files lie behind a licence; its list of them does not."""

    def model_info(self, *_: Any, **__: Any) -> Any:
        return type("Info", (), {"siblings": [], "sha": "c0ffee"})

    def auth_check(self, *_: Any) -> None:
        import httpx2
        from huggingface_hub.errors import GatedRepoError

        raise GatedRepoError("403", response=httpx2.Response(403, request=httpx2.Request("GET", "https://hub")))


def test_a_licence_that_was_not_accepted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", _Gated)
    with pytest.raises(TeacherError, match=r"owner/model is gated\. Accept its licence .* HF_TOKEN"):
        teacher_files.teacher_files(TeacherSettings(uri="owner/model"))


def test_neither_preflight_nor_the_other_small_steps_import_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import teefusion.components.runtime, teefusion.preflight, teefusion.jobs, teefusion.cluster\n"
        "from teefusion.stages import ingest, register, summary, targets\n"
        "from teefusion.settings import load_settings\n"
        "from teefusion.preflight import preflight, require_ready\n"
        "require_ready(preflight(load_settings(overrides={'device': 'cpu'}))[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
