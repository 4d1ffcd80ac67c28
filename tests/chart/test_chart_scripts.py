"""The scripts that the chart's pods run, against what they meet there: MLflow, S3, and doubles of APIs."""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
import yaml

from tests.charts import CHART, NAMESPACE, Json, render
from tests.kfpserver import KfpServer
from tests.s3 import BUCKET, ENVIRONMENT, free_port, s3_server

FILES = CHART / "files"
CREDENTIALS = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "long-enough-for-it"}


def run(script: str, *arguments: str, **variables: str) -> str:
    """What a script prints, as in its pod; it must succeed."""
    done = _run(script, *arguments, **variables)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def _run(script: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FILES / script), *arguments]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=200, check=False)


# --- MLflow ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with s3_server() as url:
        yield url


@pytest.fixture
def mlflow_server(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """A server as the chart's pod starts one, with the arguments of the rendered chart; a client's variables."""
    port = free_port()
    host = "teefusion-mlflow.ml.svc"
    auth = tmp_path / "basic_auth.ini"
    (container,) = render({}).pod("Deployment/teefusion-mlflow").spec["containers"]
    variables = {one["name"]: one["value"] for one in container["env"] if "value" in one}
    variables |= ENVIRONMENT | {
        "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow%20store.db",
        "MLFLOW_S3_ENDPOINT_URL": store,
        "MLFLOW_AUTH_CONFIG_PATH": str(auth),
        "MLFLOW_AUTH_ADMIN_USERNAME": CREDENTIALS["MLFLOW_TRACKING_USERNAME"],
        "MLFLOW_AUTH_ADMIN_PASSWORD": CREDENTIALS["MLFLOW_TRACKING_PASSWORD"],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "any",
        "DEFAULT_PERMISSION": "READ",
        "HOME": str(tmp_path),
    }
    run("mlflow/prepare.py", **variables)
    run("mlflow/prepare.py", **variables)  # as when the pod is made again
    written = configparser.ConfigParser()
    written.read(auth)
    assert written["mlflow"]["database_uri"] == variables["MLFLOW_BACKEND_STORE_URI"]
    assert auth.stat().st_mode & 0o077 == 0

    words = [word.replace("$(POD_IP)", "10.1.2.3").replace(":5000", f":{port}") for word in container["args"]]
    words = [word.replace("0.0.0.0", "127.0.0.1").replace("=5000", f"={port}") for word in words]
    words = [word.replace("/tmp/metrics", str(tmp_path / "metrics")) for word in words]
    words = [f"--artifacts-destination=s3://{BUCKET}/mlflow" if "artifacts-dest" in word else word for word in words]
    log = (tmp_path / "server.log").open("w")
    command = [str(Path(sys.executable).with_name("mlflow")), "server", *words]
    environment = os.environ | variables | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        _await_health(f"http://127.0.0.1:{port}/health", process)
        with _proxied_host(port, f"{host}:{port}") as url:
            yield (
                CREDENTIALS
                | {"MLFLOW_TRACKING_URI": url, "S3_URI": f"s3://{BUCKET}", "PORT": str(port)}
                | {name: variables[name] for name in ("MLFLOW_BACKEND_STORE_URI", *ENVIRONMENT)}
            )
    finally:
        os.killpg(process.pid, 15)
        process.wait(timeout=30)
        log.close()


def _await_health(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


@contextmanager
def _answering(answer: Callable[[BaseHTTPRequestHandler, bytes], tuple[int, bytes]]) -> Iterator[str]:
    """URL of a server that answers so."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, data = answer(self, body)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _any

        def log_message(self, *_: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def _proxied_host(port: int, host: str) -> Iterator[str]:
    """To the server as if its Service's name had been asked, which this machine cannot resolve."""

    def forward(request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        headers = Message()
        for name, value in request.headers.items():
            if name.lower() not in ("host", "connection"):
                headers[name] = value
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}{request.path}",
            body or None,
            dict(headers) | {"Host": host},
            method=request.command,
        )
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    with _answering(forward) as url:
        yield url


@pytest.mark.slow
def test_mlflow_as_the_chart_starts_it_passes_the_charts_own_tests(mlflow_server: dict[str, str]) -> None:
    told = run("tests/mlflow_check.py", **mlflow_server)
    assert "written and read" in told
    assert "by its alias" in run("tests/alias_check.py", **mlflow_server)
    run("mlflow/collect.py", "0s", **mlflow_server)  # the deleted experiment

    refused = _run("tests/mlflow_check.py", **mlflow_server | {"MLFLOW_TRACKING_PASSWORD": "wrong"})
    assert refused.returncode != 0
    # A name that is not the Service's: what the list of allowed hosts is for.
    with _proxied_host(int(mlflow_server["PORT"]), "evil.example.com") as url:
        refused = _run("tests/mlflow_check.py", **mlflow_server | {"MLFLOW_TRACKING_URI": url})
    assert "Invalid Host header" in refused.stderr
    status = _status(f"http://127.0.0.1:{mlflow_server['PORT']}/metrics", f"10.1.2.3:{mlflow_server['PORT']}")
    assert status == 200  # by the pod's address, with credentials


@pytest.mark.slow
def test_replicas_that_start_together_take_turns_at_the_database(tmp_path: Path) -> None:
    postgres = pytest.importorskip("tests.postgres", reason="there is no PostgreSQL for tests yet")
    if why := postgres.missing():
        pytest.skip(why)
    with postgres.postgres_server() as server:
        variables = {"MLFLOW_BACKEND_STORE_URI": postgres.database(server, "mlflow"), "DEFAULT_PERMISSION": "READ"}
        auth = [tmp_path / f"{replica}.ini" for replica in range(3)]
        with ThreadPoolExecutor(len(auth)) as pool:
            done = list(
                pool.map(lambda path: _run("mlflow/prepare.py", **variables, MLFLOW_AUTH_CONFIG_PATH=str(path)), auth)
            )
        assert [one.returncode for one in done] == [0] * len(auth), "".join(one.stderr[-2000:] for one in done)


def _status(url: str, host: str) -> int:
    manager = urllib.request.HTTPPasswordMgrWithDefaultRealm()
    manager.add_password(None, url, *CREDENTIALS.values())
    opener = urllib.request.build_opener(urllib.request.HTTPBasicAuthHandler(manager))
    with opener.open(urllib.request.Request(url, headers={"Host": host}), timeout=30) as answer:
        return int(answer.status)


# --- S3 --------------------------------------------------------------------------------------------------------------


def test_the_bucket_is_made_once(store: str) -> None:
    variables = ENVIRONMENT | {"MLFLOW_S3_ENDPOINT_URL": store}
    for _ in range(2):
        assert "bucket made-by-the-chart is there" in run("mlflow/create_bucket.py", "made-by-the-chart", **variables)


def test_storage_check_speaks_by_the_settings_of_the_chart(store: str) -> None:
    release = render({})
    variables: dict[str, str] = dict(release.one("ConfigMap", "teefusion-settings")["data"])
    variables["TEEFUSION_STORAGE__ENDPOINT_URL"] = store
    keys = release.one("Secret", "teefusion-s3")["stringData"]
    assert f"s3://{BUCKET}: an object written" in run("tests/storage_check.py", **variables, **keys)
    client = boto3.client("s3", endpoint_url=store, aws_access_key_id="any", aws_secret_access_key="any")
    assert client.list_objects_v2(Bucket=BUCKET, Prefix="helm-test")["KeyCount"] == 0  # nothing is left
    broken = _run("tests/storage_check.py", **variables | {"TEEFUSION_STORAGE__URI": "s3://no-such-bucket"}, **keys)
    assert "The bucket does not exist" in broken.stderr


# --- Kubernetes and Kubeflow Pipelines -------------------------------------------------------------------------------


def _check_permissions(rules: list[Json], *, elsewhere: bool = False) -> subprocess.CompletedProcess[str]:
    """The script's answer where these rules of a Role hold in the namespace `ml`."""

    def review(request: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        asked = json.loads(body)["spec"]["resourceAttributes"]
        resource = "/".join(filter(None, (asked["resource"], asked.get("subresource"))))
        granted = any(
            asked.get("group", "") in rule["apiGroups"]
            and resource in rule["resources"]
            and asked["verb"] in rule["verbs"]
            for rule in rules
        )
        allowed = granted if asked["namespace"] == "ml" else elsewhere
        answer = {"apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview", "spec": {}}
        return 201, json.dumps(answer | {"status": {"allowed": allowed}}).encode()

    # Inside a cluster the client takes address and token from the pod; here, from us.
    code = (
        "import os, runpy, kubernetes.config as config\n"
        "from kubernetes.client import Configuration\n"
        "def here():\n"
        "    made = Configuration(); made.host = os.environ['URL']; Configuration.set_default(made)\n"
        "config.load_incluster_config = here\n"
        f"runpy.run_path({str(FILES / 'tests' / 'permissions_check.py')!r}, run_name='__main__')\n"
    )
    with _answering(review) as url:
        variables = os.environ | {"URL": url, "NAMESPACE": "ml"}
        return subprocess.run(
            [sys.executable, "-c", code], env=variables, capture_output=True, text=True, timeout=100, check=False
        )


def test_permissions_check_wants_what_the_role_gives_and_no_more() -> None:
    (role,) = render({}).of("Role")
    done = _check_permissions(role["rules"])
    assert done.returncode == 0, done.stderr
    less = [rule | {"verbs": [verb for verb in rule["verbs"] if verb != "delete"]} for rule in role["rules"]]
    assert "may not: delete trainjobs. Set runner.rbac.create=true" in _check_permissions(less).stderr
    assert "gives too much" in _check_permissions(role["rules"], elsewhere=True).stderr


def test_the_workspace_is_given_to_the_group_of_steps_and_tried(tmp_path: Path) -> None:
    release = render({"security": {"runAsUser": 2000}})
    pod = next(pod for pod in release.pods if pod.owner.startswith("Job/teefusion-workspace-"))
    security = pod.spec["securityContext"]
    assert {security[name] for name in ("runAsUser", "runAsGroup", "fsGroup")} == {2000}  # that of steps
    (container,) = pod.spec["containers"]
    *command, path = container["command"]
    mounted = {one["mountPath"]: one["name"] for one in container["volumeMounts"]}
    (volume,) = (one for one in pod.spec["volumes"] if one["name"] == mounted[path])
    assert volume["persistentVolumeClaim"] == {"claimName": "teefusion-work"}
    subprocess.run([*command, str(tmp_path)], timeout=20, check=True)
    assert list(tmp_path.iterdir()) == []
    refused = subprocess.run(
        [*command, str(tmp_path / "none")], capture_output=True, text=True, timeout=20, check=False
    )
    assert refused.returncode == 1
    assert f"give its root to group {os.getgid()}" in refused.stderr.lower()


def test_the_job_for_the_workspace_has_another_name_when_its_pod_changes() -> None:
    def name(**values: Json) -> str:
        return next(name for name in render(values).names("Job") if "workspace" in name)

    assert name() == name(settings={"values": {"train": {"steps": 7}}})  # a Job's template cannot change
    assert name() != name(image={"tag": "0.2.0"})


def test_publishing_uploads_the_pipeline_once_with_the_namespaces_settings(tmp_path: Path) -> None:
    values = {"pipelines": {"publish": {"enabled": True}, "token": {"enabled": True}}}
    release = render(values | {"settings": {"values": {"train": {"steps": 77}}}})
    (container,) = release.pod("Job/teefusion-publish").spec["containers"]
    variables = os.environ | release.one("ConfigMap", "teefusion-settings")["data"]
    variables |= {one["name"]: one["value"] for one in container["env"] if "value" in one}
    assert variables["KF_PIPELINES_SA_TOKEN_PATH"] == "/var/run/secrets/kubeflow/pipelines/token"
    (tmp_path / "token").write_text("of-the-account")
    with KfpServer() as server:
        server.token = "of-the-account"
        variables |= {"KF_PIPELINES_ENDPOINT": server.url, "HOME": str(tmp_path)}
        variables["KF_PIPELINES_SA_TOKEN_PATH"] = str(tmp_path / "token")  # where Kubernetes mounts it, here
        variables["PATH"] = f"{Path(sys.executable).parent}:{variables['PATH']}"
        told = [
            subprocess.run(container["command"], env=variables, capture_output=True, text=True, timeout=200, check=True)
            for _ in range(2)
        ]
        ((pipeline,), (version,)) = server.all("pipelines"), server.all("versions")
    assert [done.stdout.partition(": ")[2].partition(":")[0] for done in told] == ["uploaded", "there already"]
    assert pipeline["namespace"] == NAMESPACE
    assert told[0].stdout.startswith(version["display_name"])
    parameters = next(yaml.safe_load_all(server.packages[0]))["root"]["inputDefinitions"]["parameters"]
    assert parameters["train_steps"]["defaultValue"] == 77
    assert "http://teefusion-mlflow.ml.svc:5000" in parameters["settings"]["defaultValue"]
