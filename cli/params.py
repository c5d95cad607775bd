"""Parameter types, options that commands share, and help texts with headings."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import click

RENAMED = {"probe-lrs": "step-sizes"}
"""Options by their names in earlier versions, which are still accepted."""


class LocationType(click.ParamType):
    """Path, or URL such as ``s3://bucket/traces``."""

    name = "path or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """Return a URL unchanged, anything else as a path."""
        return value if isinstance(value, Path) or "://" in value else Path(value)


class Numbers(click.ParamType):
    """Numbers separated by commas, such as ``0.1,0.2,0.4``."""

    name = "number,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Return the numbers."""
        try:
            return tuple(float(number) for number in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: must be numbers separated by commas, such as 0.1,0.2,0.4.", param, ctx)


class Share(click.ParamType):
    """Positive share, as ``10%`` or ``0.1``."""

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share as a number."""
        text = str(value).strip()
        try:
            share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            share = 0.0
        if not 0 < share < float("inf"):
            self.fail(f"{value!r}: must be a positive share of the training time, such as 10% or 0.1.", param, ctx)
        return share


class Option(click.Option):
    """Option under a heading of the help."""

    def __init__(self, *args: Any, heading: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class Command(click.Command):
    """Command whose help groups its options under headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of each heading, in order of definition."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)):
                sections.setdefault(getattr(option, "heading", "Help"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


Decorated = Callable[..., Any]
Decorator = Callable[[Decorated], Decorated]


def options_under(heading: str) -> Callable[..., Decorator]:
    """Return ``click.option`` for options under a heading of the help."""
    return partial(click.option, cls=Option, heading=heading)


device_option = options_under("Data and device")(
    "--device", help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]"
)
data_dir_option = options_under("Data and device")(
    "--data-dir",
    type=click.Path(path_type=Path),
    help="Folder of data files, to which missing ones are downloaded.  [default: the user's cache]",
)


def out_option(default: str, help: str) -> Decorator:
    """Return the option for the folder of results."""
    return options_under("Output")(
        "--out", type=click.Path(path_type=Path), default=Path(default), show_default=True, help=help
    )
