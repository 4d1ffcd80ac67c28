"""A release of the chart by either Helm, with the same calls."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml

from tests.charts import CHART, RELEASE, chart


class Helm4:
    """In this process; its releases are kept in memory."""

    def __init__(self, kubeconfig: str, namespace: str) -> None:
        self._config = helm_python.Config(
            kubeconfig_content=kubeconfig, namespace=namespace, storage_driver="memory", qps=1000, burst_limit=1000
        )

    def install(self, values: Mapping[str, Any]) -> str:
        """Returns the notes, as all that write values do."""
        return self._notes(self._config.install(chart(), RELEASE, dict(values)))

    def upgrade(self, values: Mapping[str, Any]) -> str:
        return self._notes(self._config.upgrade(chart(), RELEASE, dict(values)))

    def test(self) -> None:
        self._config.test(RELEASE)

    def rollback(self) -> None:
        self._config.rollback(RELEASE)

    def uninstall(self) -> None:
        self._config.uninstall(RELEASE)

    def close(self) -> None:
        self._config.close()

    @staticmethod
    def _notes(release: Mapping[str, Any]) -> str:
        assert release["status"] == "deployed"
        return str(release["notes"])


class Helm3:
    """A binary; its releases are Secrets of the cluster."""

    def __init__(self, binary: Path, kubeconfig: str, namespace: str) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._binary, self._namespace = binary, namespace
        (Path(self._folder.name) / "kubeconfig").write_text(kubeconfig)

    def install(self, values: Mapping[str, Any]) -> str:
        return self._write("install", values)

    def upgrade(self, values: Mapping[str, Any]) -> str:
        return self._write("upgrade", values)

    def test(self) -> None:
        self._run("test", RELEASE)

    def rollback(self) -> None:
        self._run("rollback", RELEASE)

    def uninstall(self) -> None:
        self._run("uninstall", RELEASE)

    def close(self) -> None:
        self._folder.cleanup()

    def _write(self, verb: str, values: Mapping[str, Any]) -> str:
        file = Path(self._folder.name) / "values.yaml"
        file.write_text(yaml.safe_dump(dict(values)))
        # The double has no schemas to validate by; kubernetes-validate does that for every object elsewhere.
        told = self._run(verb, RELEASE, str(CHART), "--values", str(file), "--disable-openapi-validation")
        assert "STATUS: deployed" in told
        return told.partition("NOTES:\n")[2]

    def _run(self, *arguments: str) -> str:
        folder = Path(self._folder.name)
        places = {f"HELM_{name}_HOME": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
        environment = os.environ | places | {"KUBECONFIG": str(folder / "kubeconfig"), "HOME": str(folder)}
        command = [str(self._binary), *arguments, "--namespace", self._namespace]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout
