"""Prompts: read, normalise, deduplicate, split, store."""

from __future__ import annotations

from typing import Any

from teefusion.errors import IntegrityError, PromptError
from teefusion.files import content_key
from teefusion.prompt_files import read_prompts, source_digest
from teefusion.prompts import build_prompt_set, load_prompt_set, write_prompt_set
from teefusion.settings import Settings
from teefusion.sources import prompt_path, require_fitting_prompts
from teefusion.workspace import StageResult, Workspace


def ingest(settings: Settings) -> StageResult:
    """Make the prompt set of pinned settings. Raises PromptError, StorageError, SettingsError for a toy set."""
    require_fitting_prompts(settings)
    workspace = Workspace(settings)
    output = workspace.folder("prompts", content_key(settings.prompts.content()))

    def work() -> tuple[dict[str, Any], bool]:
        try:
            prompts, reused = load_prompt_set(output), True
        except IntegrityError:
            options = settings.prompts
            path = prompt_path(options.source)
            if options.sha256 is not None and source_digest(path) != options.sha256:
                raise PromptError(
                    f"{path} has changed since this run began (sha256 was {options.sha256[:12]}). Restore it, or start "
                    "a new run."
                ) from None
            source = read_prompts(path)
            prompts = build_prompt_set(source, heldout_fraction=options.heldout_fraction, max_chars=options.max_chars)
            write_prompt_set(output, prompts)
            reused = False
        details = {
            "prompt_set": prompts.sha256,
            "read": prompts.read,
            "train": len(prompts.train),
            "heldout": len(prompts.heldout),
            "dropped": dict(prompts.dropped),
        }
        return details, reused

    return workspace.stage("ingest", output, work)
