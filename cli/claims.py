"""``landscape claims``: the page of the paper's claims, from recorded runs and trials."""

from pathlib import Path

import click

from landscape.errors import LandscapeError
from landscape.files import whole_file

from .output import report
from .params import Command, LocalPath, options_under


@click.command("claims", cls=Command)
@click.argument("folder", type=LocalPath(), default=Path("figures"))
@options_under("Output")("--out", type=LocalPath(), help="Markdown page.  [default: claims.md in FOLDER]")
def command(folder: Path, out: Path | None) -> None:
    """Judge the claims of the paper by recorded runs.

    FOLDER is that of `landscape figure` and `landscape table`. Each claim of arXiv:2007.08554 is judged by several
    measures, with intervals over seeds: it agrees, it does not, or it cannot be told. Nothing is trained.
    """
    # torch and pandas are slow to import, and --help does not need them.
    from landscape.paper.claims import markdown, recorded_claims
    from landscape.paper.norm_claims import norm_claims

    out = out or folder / "claims.md"
    page = markdown([norm_claims(), *recorded_claims(folder)], f"landscape claims {folder}")
    try:
        with whole_file(out) as file:
            file.write(page.encode())
    except OSError as error:
        raise LandscapeError(f"--out {out}: cannot be written ({error.strerror}). Use another path.") from error
    report(f"Page: {out}")
