"""What would stop a run later, found in seconds before anything is spent: everything at once, with what to change.

Each check is a function of the settings that returns what it found, in words, and raises an error of ours for what is
wrong. They wait for servers, so they run side by side. Imports no torch: the step that runs them has a small image.
"""

from __future__ import annotations

import functools
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from teefusion.errors import PipelineError, PreflightError, ScorerError, SettingsError, StorageError, TeEFusionError
from teefusion.files import readable_bytes
from teefusion.footprints import Footprint, device_bytes, folder_bytes, footprint, free_bytes
from teefusion.parameters import POD_VARIABLE
from teefusion.prompt_files import source_digest
from teefusion.scorer_names import BUNDLED, parse_scorer
from teefusion.settings import Settings, StorageSettings
from teefusion.sources import pin, prompt_path
from teefusion.storage import is_remote, open_store
from teefusion.teacher_files import require_source, teacher_files
from teefusion.tracking import check_access

if TYPE_CHECKING:
    from teefusion.cluster import Cluster

# Of a check that asks a server: it is to say soon that there is none.
_ATTEMPTS, _TIMEOUT_S = 2, 5.0


@dataclass(frozen=True)
class Finding:
    """What a check found."""

    check: str
    text: str
    error: TeEFusionError | None = None
    """None where all is well."""


Check = Callable[[], str | list[Finding]]
"""Returns what it found, or raises an error of ours."""


def preflight(settings: Settings) -> tuple[Settings, list[Finding]]:
    """The settings, pinned where nothing is wrong, and what each check found."""
    checks = _checks(settings)
    with ThreadPoolExecutor(max_workers=len(checks)) as threads:
        findings = [finding for some in threads.map(_find, checks, checks.values()) for finding in some]
    if any(finding.error for finding in findings):
        return settings, findings
    try:
        return pin(settings), findings
    except TeEFusionError as error:  # such as a teacher that is no longer of the revision asked for
        return settings, [*findings, Finding("revisions", str(error), error)]


def require_ready(findings: list[Finding]) -> None:
    """Raise PreflightError (exit code 2) where the request is wrong, PipelineError where only a service does not work.

    The message has all problems, one after another.
    """
    wrong = [(finding, finding.error) for finding in findings if finding.error]
    if not wrong:
        return
    kind = PreflightError if all(error.exit_code == PreflightError.exit_code for _, error in wrong) else PipelineError
    lines = "\n".join(f"  {finding.check}: {finding.text}" for finding, _ in wrong)
    raise kind(f"{len(wrong)} problem{'s' if len(wrong) > 1 else ''} found before anything was spent:\n{lines}")


def to_markdown(findings: list[Finding]) -> str:
    """The findings as a table, what is wrong first."""
    rows = [
        f"| {found.check} | {'**wrong**' if found.error else 'well'} | {found.text.replace('|', '/')} |"
        for found in sorted(findings, key=lambda finding: finding.error is None)
    ]
    return "\n".join(["| check | | found |", "| --- | --- | --- |", *(row.replace("\n", "<br>") for row in rows), ""])


def _checks(settings: Settings) -> dict[str, Check]:
    """The checks that these settings take, by name. One may find several things, each in a line of its own."""
    checks: dict[str, Check] = {
        "workdir": lambda: _workdir(settings),
        "teacher": lambda: _teacher(settings),
        "prompts": lambda: _prompts(settings),
        "scorer": lambda: _scorer(settings),
    }
    for name, source in {"second": settings.strategy.second, "lora": settings.strategy.lora}.items():
        if source is not None:
            checks[f"strategy.{name}"] = functools.partial(require_source, source)
    if settings.storage.uri:
        checks["storage"] = functools.partial(_read_and_write, settings.storage.uri, settings.storage)
    if settings.mlflow.tracking_uri:
        checks["mlflow"] = lambda: check_access(settings)
    if any(settings.cluster.takes_trainjob(stage) for stage in ("targets", "train")):
        checks["trainjobs"] = lambda: _trainjobs(settings)
    return checks


def _find(name: str, check: Check) -> list[Finding]:
    try:
        found = check()
        return [Finding(name, found)] if isinstance(found, str) else found
    except TeEFusionError as error:
        return [Finding(name, str(error), error)]


def _workdir(settings: Settings) -> str:
    options, workdir = settings.cluster, settings.workdir.resolve()
    volume = options.volume_path
    if POD_VARIABLE in os.environ and (volume is None or not workdir.is_relative_to(volume)):
        raise SettingsError(
            f"The workdir {workdir} is in this pod alone, and the next step would not find it. Set workdir below "
            "cluster.volume_path, and cluster.volume_claim to a ReadWriteMany volume, when submitting."
        )
    return _read_and_write(str(workdir), settings.storage)


def _read_and_write(uri: str, storage: StorageSettings) -> str:
    """Write, read and delete an object there. Raises StorageError, SettingsError."""
    store = open_store(uri, _impatient(storage))
    name, data = f"preflight-{uuid.uuid4().hex}", os.urandom(16)
    store.write(name, data)
    try:
        if store.read(name) != data:
            raise StorageError(f"{store.where(name)} reads otherwise than it was written. Do not trust this storage.")
    finally:
        store.delete(name)
    return f"{uri} can be read and written"


def _impatient(storage: StorageSettings) -> StorageSettings:
    quick = {"max_attempts": _ATTEMPTS, "connect_timeout_s": _TIMEOUT_S, "read_timeout_s": _TIMEOUT_S}
    return storage.model_copy(update=quick)


def _teacher(settings: Settings) -> list[Finding]:
    """Whether the teacher is there, and what it takes: only its files say how large it is."""
    found = teacher_files(settings.teacher)
    need = footprint(settings, found)
    return [
        Finding("teacher", f"{settings.teacher.uri}: {found.transformer}, {found.parameters:,} parameters"),
        *_find("disk", lambda: _disk(settings, need)),
        *_find("accelerator memory", lambda: _memory(settings, need)),
    ]


def _prompts(settings: Settings) -> str:
    source = settings.prompts.source
    return f"{source}, sha256 {source_digest(prompt_path(source))[:12]}"


def _scorer(settings: Settings) -> str:
    """That its files are there; their content is hashed when they are used."""
    options = settings.evaluate
    name = parse_scorer(options.scorer)
    if options.scorer == BUNDLED:
        return "the bundled one"
    if is_remote(name.location):
        folder, _, file = name.location.rpartition("/")
        there = open_store(folder, _impatient(settings.storage)).size(file) is not None
    else:
        there = Path(name.location).expanduser().exists()
    if there:
        return options.scorer
    if name.kind != "folder" and not name.location.startswith(("/", ".", "~", "s3:")):
        return f"{options.scorer}, on the hub: fetched when it is used"
    raise ScorerError(f"{name.location} is no scorer: there is no such file or folder. Correct evaluate.scorer.")


def _disk(settings: Settings, need: Footprint) -> str:
    workdir = settings.workdir.resolve()
    whole = need.training_disk + (0 if settings.storage.uri else need.targets_disk)
    # What is there may be this very run's: one that is taken up again is not refused for what it has stored.
    more = max(whole - sum(folder_bytes(workdir / name) for name in ("targets", "students")), 0)
    free = free_bytes(workdir)
    if more > free:
        raise StorageError(
            f"{workdir} has {readable_bytes(free)} free, and this run takes at least {readable_bytes(more)} more. Make "
            "room, take a larger volume, keep targets in S3 (storage.uri), or lower train.keep_checkpoints or "
            "targets.trajectories."
        )
    return f"at least {readable_bytes(more)} more in {workdir}, {readable_bytes(free)} free"


def _memory(settings: Settings, need: Footprint) -> str:
    have, told = device_bytes(settings), f"training takes at least {readable_bytes(need.training_memory)} a rank"
    if settings.device == "cpu" or have is None:
        return told if have else f"{told}; set cluster.accelerator_memory_gb to have that compared"
    if need.training_memory > have:
        raise SettingsError(
            f"{told}, and an accelerator has {readable_bytes(have)}. Raise train.zero_stage or the number of ranks, "
            "set train.offload, or take larger accelerators (cluster.node_selector)."
        )
    if need.targets_memory > have:
        raise SettingsError(
            f"the teacher's weights alone take {readable_bytes(need.targets_memory)}, and an accelerator has "
            f"{readable_bytes(have)}. Set teacher.dtype to bfloat16, or take larger ones (cluster.node_selector)."
        )
    return f"{told}, and an accelerator has {readable_bytes(have)}"


def _trainjobs(settings: Settings) -> list[Finding]:
    """Whether this account may make them, and whether there is what they are made of."""
    from teefusion.cluster import Cluster

    cluster = Cluster(settings.cluster.model_copy(update={"patience_s": _TIMEOUT_S}))
    return [
        *_find("trainjobs", lambda: _rights(cluster)),
        *_find("training runtime", lambda: _runtime(cluster)),
    ]


def _rights(cluster: Cluster) -> str:
    cluster.require_rights()
    return f"may be made in namespace {cluster.namespace}"


def _runtime(cluster: Cluster) -> str:
    cluster.require_runtime()
    return f"{cluster.options.runtime_kind} {cluster.options.runtime} is there"
