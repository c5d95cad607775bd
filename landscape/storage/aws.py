"""Endpoint and region of S3, from the environment and the files of AWS's own tools."""

import configparser
import os
from collections.abc import Mapping
from pathlib import Path

from landscape.errors import LandscapeError
from landscape.storage.address import reject_credentials


def s3_endpoint() -> str | None:
    """Return the endpoint of S3, None for that of AWS.

    The order is that of AWS's tools: ``AWS_ENDPOINT_URL_S3``, ``AWS_ENDPOINT_URL``, ``endpoint_url`` of ``s3`` in the
    profile's services, ``endpoint_url`` of the profile.

    Raises:
        LandscapeError: The files cannot be read, lack the profile, or the endpoint has credentials.
    """
    if os.environ.get("AWS_IGNORE_CONFIGURED_ENDPOINT_URLS", "").lower() == "true":
        return None
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or _file_endpoint()
    reject_credentials(endpoint or "")
    return endpoint


def s3_region() -> str | None:
    """Return the region of the profile, None without one.

    Raises:
        LandscapeError: The files cannot be read, or lack the profile.
    """
    return _profile(_sections()).get("region")


def _file_endpoint() -> str | None:
    sections = _sections()
    profile = _profile(sections)
    # The value of "s3 =" is indented lines of the form "name = value".
    lines = sections.get(f"services {profile.get('services')}", {}).get("s3", "").splitlines()
    service = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
    return service.get("endpoint_url") or profile.get("endpoint_url")


def _profile(sections: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Return the settings of the selected profile."""
    selected = os.environ.get("AWS_PROFILE") or os.environ.get("AWS_DEFAULT_PROFILE")
    name = selected or "default"
    # The file of credentials has sections [name], and its settings take precedence.
    found = [sections[section] for section in (f"profile {name}", name) if section in sections]
    if selected and not found:
        raise LandscapeError(
            f"AWS_PROFILE={selected}: has no section in {' or '.join(map(str, _files()))}. Use another profile, or "
            "unset it."
        )
    return {key: value for section in found for key, value in section.items()}


def _sections() -> Mapping[str, Mapping[str, str]]:
    parser = configparser.RawConfigParser(strict=False)
    for path in _files():
        try:
            parser.read(path, encoding="utf-8")
        except (configparser.Error, UnicodeDecodeError, OSError):
            # The parser's message quotes lines of the file, which may hold keys.
            raise LandscapeError(f"{path}: cannot be read as a file of AWS settings. Repair it.") from None
    return {name: dict(parser[name]) for name in parser}


def _files() -> list[Path]:
    """Return the paths of configuration and credentials."""
    names = {"AWS_CONFIG_FILE": "config", "AWS_SHARED_CREDENTIALS_FILE": "credentials"}
    paths = [os.environ.get(variable) or f"~/.aws/{name}" for variable, name in names.items()]
    return [Path(os.path.expanduser(path)) for path in paths]
