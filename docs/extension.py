"""Parts of the documentation that are generated from the code, and links to names by their last part."""

import ast
import html
import re
import textwrap
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from click.testing import CliRunner
from docutils import nodes
from docutils.parsers.rst import Directive
from landscape_cli.main import main
from sphinx.application import Sphinx
from sphinx.domains.python import PythonDomain
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

from landscape.traces.schema import TABLES

ROOT = Path(__file__).parents[1]
FOLDERS = {"landscape_cli": ROOT / "cli/main.py"}
WIDTH, LINE, PADDING = 860, 16, 10


def floors() -> list[list[str]]:
    """Return the packages of each floor, the highest first, from the contract that import-linter checks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    layers = project["tool"]["importlinter"]["contracts"][0]["layers"]
    return [[name.strip() for name in layer.split("|")] for layer in layers]


def purpose(name: str) -> str:
    """Return the first line of the docstring of a module or package."""
    path = ROOT.joinpath(*name.split("."))
    file = FOLDERS.get(name, path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
    return (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()[0].replace("``", "")


def floors_as_svg(layers: list[list[str]]) -> str:
    """Draw one row of boxes for each floor, each box with its name and its purpose."""
    parts, top = [], 0
    for layer in layers:
        width = (WIDTH - PADDING * (len(layer) - 1)) / len(layer)
        texts = [textwrap.wrap(purpose(name), int((width - 2 * PADDING) / 5.9)) for name in layer]
        height = 2 * PADDING + LINE * (1 + max(map(len, texts)))
        for column, (name, lines) in enumerate(zip(layer, texts, strict=True)):
            left = column * (width + PADDING)
            parts.append(f'<rect x="{left:.0f}" y="{top}" width="{width:.0f}" height="{height}" rx="4"/>')
            short = {"landscape_cli": "cli"}.get(name, name.removeprefix("landscape."))
            rows = [("name", short), *(("purpose", line) for line in lines)]
            for row, (kind, text) in enumerate(rows):
                x, y = left + PADDING, top + PADDING + LINE * (row + 0.8)
                parts.append(f'<text class="{kind}" x="{x:.0f}" y="{y:.0f}">{html.escape(text)}</text>')
        top += height + PADDING
    label = "Floors of the package; imports point downwards only"
    return (
        f'<svg class="floors" role="img" aria-label="{label}" viewBox="-1 -1 {WIDTH + 2} {top}">{"".join(parts)}</svg>'
    )


class Floors(Directive):
    """The floors of the package as an inline picture, which follows the colours of the theme."""

    def run(self) -> list[nodes.Node]:
        """Return the picture."""
        return [nodes.raw("", floors_as_svg(floors()), format="html")]


class Columns(Directive):
    """The columns of a table of a trace, from its schema."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return a table with name, type, unit and meaning of each column."""
        rows = [(column.name, column.type, column.unit, column.meaning) for column in TABLES[self.arguments[0]]]
        group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in (20, 15, 20, 45)), cols=4)
        group += nodes.thead("", _row([nodes.Text(title) for title in ("column", "type", "unit", "meaning")]))
        body = nodes.tbody()
        for name, *rest in rows:
            body += _row([nodes.literal(name, name), *map(nodes.Text, rest)])
        group += body
        return [nodes.table("", group, classes=["table"])]


class Help(Directive):
    """The help text of a command, as ``--help`` prints it."""

    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the text as a literal block."""
        names = [*self.arguments, "--help"]
        text = CliRunner().invoke(main, names, prog_name="landscape", terminal_width=110).output
        return [nodes.literal_block(text, text, language="text")]


def _row(cells: list[Any]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", cell)) for cell in cells))


def insert_figures(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put figures/README.md and the claims in place of the link to it, with links that start from here."""
    if docname == "reproduction":
        path = ROOT / "figures/README.md"
        app.env.note_dependency(str(path), docname=docname)
        _, _, text = path.read_text().partition("\n")  # without its title
        text = re.sub(r"\]\((?!\w+:|#)([^)]+)\)", r"](../figures/\1)", text)
        text = re.sub(r"\]\((\S+\.md)\)", r"](path:\1)", text)  # a file to download, not a page
        claims = ROOT / "figures/claims.md"
        app.env.note_dependency(str(claims), docname=docname)
        text += "\n" + re.sub("^#", "##", claims.read_text(), flags=re.MULTILINE)
        source[0] = re.sub(r"^\[.*\]\(../figures/README.md\).$", lambda _: text, source[0], flags=re.MULTILINE)


def resolve_by_last_part(
    app: Sphinx, env: BuildEnvironment, reference: nodes.Element, contents: nodes.Element
) -> nodes.Element | None:
    """Link ``landscape.measured`` and ``measured`` to ``landscape.analysis.measured`` if no other name ends so."""
    if reference.get("refdomain") != "py":
        return None
    domain = cast(PythonDomain, env.get_domain("py"))
    target: str = reference["reftarget"]
    last = target.rpartition(".")[2]
    found = [
        (name, entry)
        for name, entry in domain.objects.items()
        if name.rpartition(".")[2] == last and not entry.aliased and name.startswith("landscape")
    ]
    if len(found) != 1 or not (target == last or target.startswith("landscape")):
        return None
    name, entry = found[0]
    return make_refnode(app.builder, reference["refdoc"], entry.docname, entry.node_id, contents, name)


def setup(app: Sphinx) -> Mapping[str, Any]:
    """Register the directives and the links."""
    app.add_directive("floors", Floors)
    app.add_directive("columns", Columns)
    app.add_directive("help", Help)
    app.connect("source-read", insert_figures)
    app.connect("missing-reference", resolve_by_last_part)
    return {"parallel_read_safe": True}
