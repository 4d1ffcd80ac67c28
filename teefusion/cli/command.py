"""How every subcommand is made: shared options, settings, one result, one message where it fails."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from teefusion import __version__
from teefusion.cli.options import FLAGS, SETTING_OPTIONS
from teefusion.errors import SettingsError, TeEFusionError, UsageError

if TYPE_CHECKING:
    from teefusion.settings import Settings

SOURCES = "teefusion.sources"
"""Key of the click context's notes under which (config, overrides) of the command are found."""


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="teefusion")
def cli() -> None:
    """Distil guided text-to-image teachers into students that need one forward a step.

    Settings come from the command line, TEEFUSION_* variables (nested with two underscores, as in
    TEEFUSION_TRAIN__STEPS), --config FILE.yaml and the teacher's preset, in this order.
    """


def command(
    *setting_options: str, pinned: bool = True, parent: click.Group = cli, group: bool = False
) -> Callable[[Callable[..., dict[str, Any]]], Any]:
    """A subcommand with the shared options and those of ``SETTING_OPTIONS`` it names; one with its own, as ``group``.

    The function gets settings, pinned unless it needs neither teacher nor prompts, and its own options. It returns
    what ``--json`` prints; ``_text`` in it is what a person reads instead, ``_exit`` the exit code.
    """

    def decorate(function: Callable[..., dict[str, Any]]) -> click.Command:
        @functools.wraps(function)
        def invoke(
            config: Path | None, workdir: Path, sets: tuple[str, ...], as_json: bool, debug: bool, **options: Any
        ) -> None:
            if click.get_current_context().invoked_subcommand:
                return
            chosen = {name: options.pop(name.replace("-", "_")) for name in setting_options}
            with _report_errors(debug):
                overrides = {SETTING_OPTIONS[name][0]: value for name, value in chosen.items() if value is not None}
                overrides |= _parse_sets(sets)
                settings = _load(config, workdir, overrides, debug, pinned)
                click.get_current_context().meta[SOURCES] = config, overrides
                result = function(settings, **options)
            text, code = result.pop("_text", None), result.pop("_exit", 0)
            click.echo(json.dumps(result, ensure_ascii=False) if as_json else text or json.dumps(result, indent=2))
            sys.exit(code)

        made: Any = invoke
        for name in reversed(setting_options):
            _, kind, text = SETTING_OPTIONS[name]
            name_ = name.replace("-", "_")
            made = click.option(f"--{FLAGS.get(name, name)}", name_, type=kind, default=None, help=text)(made)
        for option in reversed(_SHARED):
            made = option(made)
        name = function.__name__.rstrip("_")
        return parent.group(name=name, invoke_without_command=True)(made) if group else parent.command(name)(made)

    return decorate


_SHARED = (
    click.option("--config", type=click.Path(path_type=Path), help="YAML file of settings."),
    click.option(
        "--workdir", type=click.Path(path_type=Path), default=None, help="Folder for everything made.  [default: work]"
    ),
    click.option(
        "--set",
        "sets",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any setting by its dotted name; repeatable, and stronger than the options.",
    ),
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object on standard output."),
    click.option("--debug", is_flag=True, help="Tracebacks, and the libraries' own logs."),
)


class _report_errors:  # noqa: N801  # a context manager that reads as a verb
    """Errors of ours end in one message and their exit code; anything else is said to be a defect."""

    def __init__(self, debug: bool) -> None:
        self._debug = debug

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if error is None or self._debug or isinstance(error, click.ClickException | click.exceptions.Exit | SystemExit):
            return
        if isinstance(error, TeEFusionError):
            click.echo(f"teefusion: {error}", err=True)
            sys.exit(error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            click.echo("\nteefusion: interrupted; run the same command again to continue.", err=True)
            sys.exit(130)
        if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("teefusion"):
            click.echo(
                f"teefusion: {error}. Install the extras: pip install 'teefusion[pipeline,train,serve]'.", err=True
            )
            sys.exit(UsageError.exit_code)
        if isinstance(error, Exception):
            click.echo(
                f"teefusion: unexpected {type(error).__name__}: {error}. Run with --debug for the trace.", err=True
            )
            sys.exit(1)


def _load(config: Path | None, workdir: Path | None, overrides: dict[str, Any], debug: bool, pinned: bool) -> Settings:
    from teefusion.logs import setup_logging
    from teefusion.settings import load_settings
    from teefusion.sources import pin

    setup_logging(verbose=debug)
    if workdir is not None:
        overrides["workdir"] = workdir
    settings = load_settings(config=config, overrides=overrides)
    return pin(settings) if pinned else settings


def _parse_sets(sets: tuple[str, ...]) -> dict[str, Any]:
    """``key=value`` pairs; values are YAML, so numbers, booleans, lists and null are what they look like."""
    import yaml

    parsed: dict[str, Any] = {}
    for item in sets:
        key, separator, value = item.partition("=")
        if not separator or not key:
            raise SettingsError(f"--set takes KEY=VALUE, as in --set train.steps=500; got {item!r}.")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"--set {key}: the value {value!r} is not valid YAML: {error}") from error
    return parsed
