"""Write the chart's README.md from README.md.head and the comments in values.yaml: ``python charts/readme.py``.

A comment above a key that begins with ``# --`` describes it. Keys with further keys on lines of their own are groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import yaml

CHART = Path(__file__).parent / "teefusion"
MARK = "# --"


def comment(lines: list[str], number: int) -> str:
    """The description above a line; empty where there is none."""
    above = number
    while above and lines[above - 1].lstrip().startswith("#"):
        above -= 1
        if lines[above].lstrip().startswith(MARK):
            return " ".join(line.strip().lstrip("#").removeprefix(" --").strip() for line in lines[above:number])
    return ""


def rows(node: yaml.MappingNode, lines: list[str], path: str = "") -> Iterator[tuple[str, str | None, str]]:
    """Path, default as JSON and description of each key below a node; the default of a group is none."""
    for key, value in node.value:
        here = f"{path}.{key.value}" if path else key.value
        is_group = isinstance(value, yaml.MappingNode) and not value.flow_style
        default = yaml.safe_load(yaml.serialize(value))
        yield here, None if is_group else json.dumps(default), comment(lines, key.start_mark.line)
        if is_group:
            yield from rows(value, lines, here)


def table(lines: list[str], node: yaml.MappingNode) -> Iterator[str]:
    """Markdown: first the keys that stand alone, then a section for each group at the top."""
    every = list(rows(node, lines))
    sections = {path: text for path, default, text in every if default is None and "." not in path}
    for section in ("", *sections):
        yield from ["", f"### {section}" if section else "### General", ""]
        if section:
            yield from [sections[section], ""]
        yield from ["| value | default | |", "| --- | --- | --- |"]
        for path, default, text in every:
            mine = path.startswith(f"{section}.") if section else "." not in path and default is not None
            if mine and (default is not None or text):
                shown = "" if default is None else f"`{default}`".replace("|", "\\|")
                yield f"| `{path}` | {shown} | {text.replace('|', chr(92) + '|')} |"


def readme() -> str:
    """The whole file."""
    text = (CHART / "values.yaml").read_text()
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(node, yaml.MappingNode)
    return (CHART / "README.md.head").read_text() + "\n".join(table(text.splitlines(), node)) + "\n"


if __name__ == "__main__":
    (CHART / "README.md").write_text(readme())
