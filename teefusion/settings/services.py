"""What a run uses around it: MLflow, object storage, Kubeflow Pipelines."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from teefusion.settings.section import Section


class MlflowSettings(Section):
    """Tracking and registry. Credentials come from MLflow's own variables, never from here."""

    tracking_uri: str | None = None
    """None is SQLite in the workdir."""
    experiment: str = "teefusion"
    model_name: str | None = None
    """Registered model; none is `teefusion-<teacher>`."""
    timeout_s: float = Field(default=10.0, gt=0)
    """For the server's first answer."""
    flush_timeout_s: float = Field(default=60.0, ge=0)
    """At the end of a stage, for records that a server which was away has not taken yet."""

    operational: ClassVar[frozenset[str]] = frozenset({"tracking_uri", "experiment", "timeout_s", "flush_timeout_s"})


class StorageSettings(Section):
    """Where target sets and registered students are kept, and how S3 is spoken to.

    Credentials come from the environment, never from here.
    """

    uri: str | None = None
    """A folder, `file:///folder` or `s3://bucket/prefix`; none is the workdir."""
    endpoint_url: str | None = None
    """S3 server, as `https://host:port`; none is AWS."""
    region: str | None = None
    """None is what boto3 finds."""
    addressing_style: Literal["auto", "path", "virtual"] = "auto"
    """`path` is what most servers other than AWS need."""
    max_attempts: int = Field(default=10, gt=0)
    """Of a request, with growing pauses between them."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    read_timeout_s: float = Field(default=60.0, gt=0)
    multipart_mb: int = Field(default=64, ge=5, le=5000)
    """Larger objects travel in parts of this size (MiB)."""
    cache_gb: float = Field(default=50.0, gt=0)
    """Disk in the workdir (GiB) for shards read from S3; the ones read longest ago make room."""

    operational: ClassVar[frozenset[str]] = frozenset(
        {"uri", "endpoint_url", "region", "addressing_style", "max_attempts", "connect_timeout_s", "read_timeout_s"}
        | {"multipart_mb", "cache_gb"}
    )


class KfpSettings(Section):
    """Kubeflow Pipelines, where runs are submitted. None of it changes a result.

    Credentials come from kfp's own variables (KF_PIPELINES_...), or a pod's service account.
    """

    host: str | None = None
    """`http(s)://host[:port][/pipeline]`; none is KF_PIPELINES_ENDPOINT, else the cluster of the pod or kubeconfig."""
    ui_host: str | None = None
    """Where people open it, for the URLs that are printed; none is `host`."""
    namespace: str | None = None
    """Where Kubeflow has several users; none is kfp's own setting."""
    experiment: str = "teefusion"
    pipeline: str = Field(default="teefusion-distill", pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    """Its versions are named by their content."""
    service_account: str | None = "teefusion-runner"
    """Of the steps; none is Kubeflow's own."""
    poll_s: float = Field(default=10.0, gt=0)
    """Between two looks at a run that is waited for."""

    def content(self) -> dict[str, Any]:
        """Nothing: where a run is submitted changes no result."""
        return {}
