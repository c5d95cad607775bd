"""Files of data sets: found in a folder or fetched, and hash-checked before anything interprets them."""

import gzip
import hashlib
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pooch

from landscape.errors import LandscapeError

TIMEOUT = (3, 15)
"""Seconds to wait for a connection (to each address of a mirror), and for the next bytes."""

LARGEST = 1 << 30
"""Bytes of a file that is read into memory to be checked."""

ImagesAndLabels = tuple[np.ndarray, np.ndarray]
"""Images (N, C, H, W) and their labels (N,), both uint8."""


@dataclass(frozen=True)
class Source:
    """Where the files of a data set come from, and what they must be.

    Attributes:
        name: The data set; also the folder that files are fetched into.
        mirrors: Addresses that end in a slash.
        sha256: By the names of all files that may be opened, packed and unpacked.
        archive: The only file that mirrors have, a gzipped tar with the others in it; without it they have each file,
            gzipped.
        inside: The folder in the archive, and where its files are once someone has unpacked it.
    """

    name: str
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]
    archive: str = ""
    inside: str = ""


def find_file(name: str, folder: Path, source: Source) -> Path | None:
    """Where a file lies, raw or gzipped: in the folder, or in a subfolder named like the data set or its archive's."""
    places = dict.fromkeys([folder, folder / source.name, folder / source.inside, folder / source.name / source.inside])
    known = [own for own in (name, f"{name}.gz") if own in source.sha256]
    paths = [place / own for place in places for own in known]
    return next(filter(Path.is_file, paths), None)


def read_files(names: Sequence[str], folder: Path, source: Source) -> list[bytes]:
    """Contents of files, unpacked: found in the folder or fetched, and hash-checked before anything interprets them.

    Raises:
        LandscapeError: A file is damaged, or missing and not to be had.
    """
    found = [find_file(name, folder, source) for name in names]
    if source.archive and None in found:
        path = find_file(source.archive, folder, source) or _fetch(folder / source.name / source.archive, source)
        return _members(_checked(path, source), names, source)
    paths = [
        path or _fetch(folder / source.name / f"{name}.gz", source) for name, path in zip(names, found, strict=True)
    ]
    contents = [_checked(path, source) for path in paths]
    return [gzip.decompress(c) if path.suffix == ".gz" else c for path, c in zip(paths, contents, strict=True)]


def _members(archive: bytes, names: Sequence[str], source: Source) -> list[bytes]:
    """Files of a gzipped tar, read in one pass and never written anywhere."""
    wanted, contents = {f"{source.inside}/{name}": name for name in names}, {}
    with tarfile.open(fileobj=BytesIO(archive), mode="r|gz") as file:
        for member in file:
            if member.name in wanted and member.isreg() and (content := file.extractfile(member)) is not None:
                contents[wanted[member.name]] = content.read()
    if missing := [path for path, name in wanted.items() if name not in contents]:
        raise LandscapeError(f"The archive {source.archive} has no file {', '.join(missing)}; replace it.")
    return [contents[name] for name in names]


def _checked(path: Path, source: Source) -> bytes:
    if (size := path.stat().st_size) > LARGEST:
        raise LandscapeError(
            f"{path} is damaged: it has {size} bytes, no file of {source.name} has more than {LARGEST}."
        )
    content = path.read_bytes()
    expected, found = source.sha256[path.name], hashlib.sha256(content).hexdigest()
    if found != expected:
        raise LandscapeError(
            f"{path} is damaged: SHA-256 {expected} expected, {found} found; "
            "put the original in its place, or delete it to have it fetched again"
        )
    return content


def _fetch(path: Path, source: Source) -> Path:
    """Download to the path from the first mirror that has the right file; pooch leaves no half and no wrong file."""
    expected, failures = source.sha256[path.name], []
    download: Any = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)  # pooch 1.9's types refuse its own class
    path.parent.mkdir(parents=True, exist_ok=True)
    for mirror in source.mirrors:
        try:
            pooch.retrieve(mirror + path.name, f"sha256:{expected}", path.name, path.parent, downloader=download)
            return path
        except (OSError, ValueError) as error:
            failures.append(f"{mirror}: {error}")
    raise LandscapeError(
        f"{path} is missing and cannot be fetched; put the file there (SHA-256 {expected}) "
        f"or give the folder that holds it as data_dir; tried {'; '.join(failures)}"
    )
