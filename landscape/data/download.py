"""Files of data sets, found in a folder or downloaded, and verified by hash before they are parsed."""

import gzip
import hashlib
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from landscape.errors import LandscapeError
from landscape.text import short

TIMEOUT = (3, 15)
"""Timeouts in seconds: to connect (to each address of a mirror), and to receive the next bytes."""

MAX_BYTES = 1 << 30
"""Maximum size in bytes of a file, since files are read into memory to be verified."""

ImagesAndLabels = tuple[np.ndarray, np.ndarray]
"""Images (N, C, H, W) and their labels (N,), both uint8."""


@dataclass(frozen=True)
class Source:
    """Mirrors and hashes of the files of a data set.

    Attributes:
        name: Name of the data set, and of the subfolder for downloads.
        mirrors: URLs that end in a slash.
        sha256: Expected hash of every file that may be opened, packed or unpacked, by file name.
        archive: Gzipped tar that holds all other files, if the mirrors offer only that; empty if they offer each file
            gzipped.
        inside: Folder of the files within the archive, and the name of the folder after it was unpacked by hand.
    """

    name: str
    mirrors: tuple[str, ...]
    sha256: Mapping[str, str]
    archive: str = ""
    inside: str = ""


def find_file(name: str, folder: Path, source: Source) -> Path | None:
    """Return the path of a raw or gzipped file.

    None if it is missing. The folder and its subfolders ``name``, ``inside`` and ``name/inside`` of the source are
    searched. A file without an expected hash is ignored.
    """
    folders = folder, folder / source.name, folder / source.inside, folder / source.name / source.inside
    names = [variant for variant in (name, f"{name}.gz") if variant in source.sha256]
    return next((path for parent in folders for variant in names if (path := parent / variant).is_file()), None)


def read_files(names: Sequence[str], folder: Path, source: Source) -> list[bytes]:
    """Return the contents of files: found or downloaded, verified, decompressed.

    Raises:
        LandscapeError: A file is damaged, or missing and cannot be downloaded.
    """
    found = [find_file(name, folder, source) for name in names]
    if source.archive and None in found:
        path = find_file(source.archive, folder, source) or _download(folder / source.name / source.archive, source)
        return _extract(_read_verified(path, source), names, source)
    paths = [
        path or _download(folder / source.name / f"{name}.gz", source) for name, path in zip(names, found, strict=True)
    ]
    contents = [_read_verified(path, source) for path in paths]
    return [gzip.decompress(c) if path.suffix == ".gz" else c for path, c in zip(paths, contents, strict=True)]


def _extract(archive: bytes, names: Sequence[str], source: Source) -> list[bytes]:
    """Read files of a gzipped tar without extracting it."""
    wanted, contents = {f"{source.inside}/{name}": name for name in names}, {}
    with tarfile.open(fileobj=BytesIO(archive), mode="r|gz") as file:
        for member in file:
            if member.name in wanted and member.isreg() and (content := file.extractfile(member)) is not None:
                contents[wanted[member.name]] = content.read()
    if missing := [path for path, name in wanted.items() if name not in contents]:
        raise LandscapeError(f"{source.archive} is damaged: it has no file {', '.join(missing)}. Replace the archive.")
    return [contents[name] for name in names]


def _read_verified(path: Path, source: Source) -> bytes:
    if (size := path.stat().st_size) > MAX_BYTES:
        raise LandscapeError(
            f"{path} is damaged: {size} bytes, expected at most {MAX_BYTES} in {source.name}. Replace the file."
        )
    content = path.read_bytes()
    expected, found = source.sha256[path.name], hashlib.sha256(content).hexdigest()
    if found != expected:
        raise LandscapeError(
            f"{path} is damaged: SHA-256 {found}, expected {expected}. "
            "Replace it by the original, or delete it to download it again."
        )
    return content


def _cause(error: BaseException) -> str:
    """Return the innermost cause of a failed download, in short.

    The message of an HTTP library repeats those of all its layers, with addresses of objects.
    """
    while isinstance(inner := getattr(error, "reason", None) or next(iter(error.args), None), BaseException):
        error = inner
    return short(str(error).rpartition("): ")[2], 300)


def _download(path: Path, source: Source) -> Path:
    """Download a file from the first mirror that has it.

    A failed download leaves no file behind: pooch verifies a temporary file before it moves it to the path.
    """
    import pooch  # on first use, as it warns in notebooks without ipywidgets

    expected, failures = source.sha256[path.name], []
    # The annotation is Any, because the type hints of pooch 1.9 reject its own class.
    downloader: Any = pooch.HTTPDownloader(progressbar=True, timeout=TIMEOUT)
    path.parent.mkdir(parents=True, exist_ok=True)
    for mirror in source.mirrors:
        try:
            pooch.retrieve(mirror + path.name, f"sha256:{expected}", path.name, path.parent, downloader=downloader)
            return path
        except (OSError, ValueError) as error:
            failures.append(f"{mirror}: {_cause(error)}")
    raise LandscapeError(
        f"{path} is missing and could not be downloaded ({'; '.join(failures)}). "
        f"Put the file there (SHA-256 {expected}), or pass its folder as data_dir."
    )
