"""Paths and URLs on the command line."""

from pathlib import Path
from typing import Any

import click


class PlaceType(click.ParamType):
    """A path, or a URL such as ``s3://bucket/traces``."""

    name = "path or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """The URL as it is, or the path."""
        return value if isinstance(value, Path) or "://" in value else Path(value)
