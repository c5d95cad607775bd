"""Parameter types, options that commands share, and help texts with headings."""

import warnings
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from .output import QUIET, TRACEBACK, VERBOSE

RENAMED = {"probe-lrs": "step-sizes"}
"""Options by their names in earlier versions, which are still accepted."""


class LocationType(click.ParamType):
    """Path, or URL such as ``s3://bucket/traces``."""

    name = "path or URL"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str | Path:
        """Return the address in normal form, without credentials."""
        from landscape.storage.address import normalized

        return normalized(value)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """Return the request for paths, which the shell completes."""
        return [CompletionItem(incomplete, type="file")]


class LocalPath(click.Path):
    """Path on this machine."""

    def __init__(self) -> None:
        super().__init__(path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path without ``~``, which shells leave in ``--out=~/x``."""
        from landscape.storage.address import local_path

        return super().convert(local_path(value, param.opts[0] if param else "path"), param, ctx)


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
    """Positive share, as ``10%`` or ``0.1``.

    A number from 1 on must have the percent sign, because 20 may be meant as 20 %.
    """

    name = "share"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Return the share as a number."""
        text = str(value).strip()
        try:
            # A decimal number, so that 7% is 0.07.
            share = float(Decimal(text.removesuffix("%")) / (100 if text.endswith("%") else 1))
        except (ArithmeticError, ValueError):
            share = 0.0
        if not 0 < share < float("inf"):
            self.fail(f"{value!r}: must be a positive share of the training time, such as 10% or 0.1.", param, ctx)
        if share >= 1 and not text.endswith("%"):
            self.fail(f"{value!r}: must be below 1, or a percentage. Write {text}% or {share * 100:g}%.", param, ctx)
        return share

    @staticmethod
    def to_text(share: float) -> str:
        """Return a share as a word of a command line."""
        return f"{Decimal(repr(share)) * 100}%"


class Option(click.Option):
    """Option under a heading of the help."""

    def __init__(self, *args: Any, heading: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class Command(click.Command):
    """Command whose help groups its options under headings."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._messages = [_flag(key, *names, help=text) for key, names, text in _MESSAGES]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters, with those of every command."""
        params = super().get_params(ctx)
        own = len(self.params)  # --help is after them
        return [*params[:own], *self._messages, *params[own:]]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of each heading, in order of definition."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for option in self.get_params(ctx):
            if isinstance(option, click.Option) and (record := option.get_help_record(ctx)):
                sections.setdefault(getattr(option, "heading", "Help"), []).append(record)
        for heading, records in sections.items():
            with formatter.section(heading):
                formatter.write_dl(records)


_MESSAGES = (
    (QUIET, ("-q", "--quiet"), "Print only tables, warnings and errors."),
    (VERBOSE, ("-v", "--verbose"), "Print a line per epoch in logs, and all warnings of libraries."),
    (TRACEBACK, ("--traceback",), "Print the traceback of an error, too."),
)
"""Options of every command."""


def _flag(key: str, *names: str, help: str) -> Option:
    # Eager, so that they apply to errors in other options.
    return Option(names, heading="Messages", help=help, is_eager=True, **remembered(key))


def remembered(key: str) -> dict[str, Any]:
    """Return arguments of a flag that :func:`is_set` reads."""

    def remember(ctx: click.Context, param: click.Parameter, value: bool) -> None:
        ctx.meta[key] = value
        if key == VERBOSE and value:
            warnings.simplefilter("default")

    return {"is_flag": True, "expose_value": False, "callback": remember}


Decorated = Callable[..., Any]
Decorator = Callable[[Decorated], Decorated]


def options_under(heading: str) -> Callable[..., Decorator]:
    """Return ``click.option`` for options under a heading of the help."""
    return partial(click.option, cls=Option, heading=heading)


def _existing_folder(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """Return the folder; a mistyped one is not created."""
    if value is not None and not value.is_dir():
        raise click.BadParameter(f"{value}: is no folder. Correct it, or create the folder for downloads first.")
    return value


device_option = options_under("Data and device")(
    "--device", help="cpu, cuda, cuda:1, ...  [default: the GPU if there is one]"
)
data_dir_option = options_under("Data and device")(
    "--data-dir",
    type=LocalPath(),
    callback=_existing_folder,
    help="Folder of data files, to which missing ones are downloaded.  [default: the user's cache]",
)


def out_option(default: str, help: str) -> Decorator:
    """Return the option for the folder of results."""
    return options_under("Output")("--out", type=LocalPath(), default=Path(default), show_default=True, help=help)
