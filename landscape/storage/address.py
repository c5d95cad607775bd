"""Paths and URLs of traces, as users write them."""

import re
from pathlib import Path

from landscape.errors import LandscapeError
from landscape.files import as_text, expand_user, is_url
from landscape.text import without_secrets

Location = str | Path
"""A path, or a URL such as ``s3://bucket/traces``."""

_WITHOUT_BUCKET = {"file", "hdfs", "viewfs"}
_CREDENTIALS = (
    "an address must not hold credentials, because addresses are printed and recorded. Leave them to the tools of the "
    "store: ~/.aws/credentials or AWS_ACCESS_KEY_ID, GOOGLE_APPLICATION_CREDENTIALS, AZURE_CLIENT_SECRET or az login."
)


def normalized(location: Location) -> Location:
    """Return an address without ``~`` and empty parts.

    Raises:
        LandscapeError: The address is empty, has credentials or no bucket, or the home folder is not known.

    Examples:
        >>> normalized("s3://bucket//traces/")
        's3://bucket/traces'
        >>> normalized(Path("s3://bucket/traces"))
        's3://bucket/traces'
    """
    text = as_text(location)
    if not text or "\0" in text:
        raise LandscapeError(f"address {text!r}: must be a folder or a URL. Check the variable that holds it.")
    if not is_url(location):
        try:
            return expand_user(location)
        except FileNotFoundError as error:
            raise LandscapeError(f"{location}: {error.strerror}.") from error
    reject_credentials(text)
    scheme, _, rest = text.partition(":/")
    scheme = scheme.lower()
    rest, mark, options = rest.removeprefix("/").partition("?")
    host, *parts = rest.split("/")
    if scheme == "file" and host not in ("", "localhost"):
        if text.startswith("//", len("file:")):
            raise LandscapeError(f"{text}: must be a path on this machine with three slashes, such as file:///home/me.")
        host, parts = "", [host, *parts]  # pathlib makes file:/home of file:///home.
    if scheme == "s3" and re.search("[@:]", host):
        raise LandscapeError(f"s3://***: {_CREDENTIALS}")
    if not host and scheme not in _WITHOUT_BUCKET:
        raise no_bucket(text)
    return f"{scheme}://" + "/".join([host, *(part for part in parts if part)]) + mark + options


def no_bucket(url: str) -> LandscapeError:
    """Return the error of a URL without a bucket."""
    return LandscapeError(f"{url}: names no bucket. Use a URL with a bucket and a folder, such as s3://bucket/traces.")


def local_path(path: str | Path, name: str) -> Path:
    """Return a path on this machine, without ``~``.

    Args:
        path: Path that a user gave.
        name: Name of the argument in error messages.

    Raises:
        LandscapeError: It is a URL, or the home folder is not known.
    """
    place = normalized(path)
    if not isinstance(place, Path):
        # Here a URL would become a folder with the name "s3:".
        raise LandscapeError(f"{name}={place}: must be a path on this machine. URLs are for traces.")
    return place


def inside(location: Location, name: str) -> Location:
    """Return the path or URL of ``name`` inside a location.

    Raises:
        LandscapeError: See `normalized`.

    Examples:
        >>> inside("s3://bucket/traces/", "run")
        's3://bucket/traces/run'
    """
    place = normalized(location)
    if isinstance(place, Path):
        return place / name
    folder, mark, options = place.partition("?")
    return f"{folder}/{name}{mark}{options}"


def outer_and_name(location: Location) -> tuple[Location, str]:
    """Return the outer folder and the last part.

    Examples:
        >>> outer_and_name("gs://bucket/traces/run?project_id=p")
        ('gs://bucket/traces?project_id=p', 'run')
    """
    place = normalized(location)
    if isinstance(place, Path):
        return place.parent, place.name
    path, mark, options = place.partition("?")
    outer, _, name = path.rpartition("/")
    return f"{outer}{mark}{options}", name


def reject_credentials(url: str) -> None:
    """Raise a LandscapeError if a URL has credentials."""
    if (shown := without_secrets(url)) != url:
        raise LandscapeError(f"{shown}: {_CREDENTIALS}")
