"""The commands over the registry: models, promote, rollback, history."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from teefusion.cli.command import command

if TYPE_CHECKING:
    from teefusion.settings import Settings


@command("tracking-uri", pinned=False)
@click.argument("name", required=False)
@click.argument("version", required=False)
def models(settings: Settings, name: str | None, version: str | None) -> dict[str, Any]:
    """List registered versions, of model NAME or of all; with VERSION, where that one came from and its model card."""
    from teefusion.registry import listing

    if name and version:
        row = listing.describe_version(settings, name, version)
        return row | {"_text": listing.version_text(row)}
    rows = listing.list_versions(settings, name)
    return {"versions": rows, "_text": listing.versions_text(rows)}


@command("tracking-uri", pinned=False)
@click.argument("name")
@click.argument("version")
@click.option("--override", metavar="REASON", help="Promote it whatever its gate or digest says; recorded for good.")
def promote(settings: Settings, name: str, version: str, override: str | None) -> dict[str, Any]:
    """Make VERSION of model NAME champion; the one before becomes previous.

    Refused where the gate did not pass or did not run, or where the student's files are not those registered.
    """
    from teefusion.registry import promotion

    moved = promotion.promote(settings, name, version, override=override)
    return moved.to_dict() | {"_text": _told(moved)}


@command("tracking-uri", pinned=False)
@click.argument("name")
def rollback(settings: Settings, name: str) -> dict[str, Any]:
    """Give champion of model NAME back to the version before."""
    from teefusion.registry import promotion

    moved = promotion.rollback(settings, name)
    return moved.to_dict() | {"_text": _told(moved)}


@command("tracking-uri", pinned=False)
@click.argument("name")
def history(settings: Settings, name: str) -> dict[str, Any]:
    """Show who was champion of model NAME when, and who decided it."""
    from teefusion.registry import listing

    found = listing.history(settings, name)
    return found | {"_text": listing.history_text(found)}


def _told(moved: Any) -> str:
    was = f"; previous is version {moved.previous}" if moved.previous else ""
    now = "is now" if moved.changed else "was already"
    return f"Version {moved.champion} {now} champion of {moved.name}{was}."
