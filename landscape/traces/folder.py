"""The folder of a recorded run: its names and what lies in it."""

import json
import re
from collections.abc import Iterable
from typing import Any

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Location, Store, reason, store_at
from landscape.traces.parquet import check_version
from landscape.traces.schema import TABLES, VERSION

FACTS = "run.json"
CHECKPOINT = "checkpoint.pt"
"""What an unfinished run goes on from."""
INTERNAL_FACTS = {"version", "id"}
"""Facts that are for this package, and no columns."""


def has_rows(place: Location) -> bool:
    """Whether a run was recorded in the place; one that ended before its first flush left nothing worth keeping."""
    return any(first_row(name) is not None for name in store_at(place).names())


def read_facts(store: Store) -> dict[str, Any]:
    """What the ``run.json`` of a run says, nothing if there is none.

    Raises:
        LandscapeError: It cannot be read, or is of a later version.
    """
    path = store.inside(FACTS)
    try:
        facts = dict(json.loads(store.read(FACTS)))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, OSError, RecursionError) as error:
        raise LandscapeError(f"{path} cannot be read as JSON ({reason(error)}); mend it, or move it out.") from error
    check_version(facts.get("version", VERSION), path)
    return facts


def part_names(names: Iterable[str], table: str) -> list[str]:
    """Those of the files that are parts of a table, in the order of their rows."""
    return sorted(name for name in names if name.startswith(f"{table}-") and name.endswith(".parquet"))


def first_row(name: str) -> int | None:
    """Index of the first row of a part, as its name says; None if it does not."""
    found = re.fullmatch(rf"(?:{'|'.join(TABLES)})-(\d+)\.parquet", name)
    return int(found[1]) if found else None


def folder_name(place: Location) -> str:
    """Last part of the path or URL."""
    return str(place).rstrip("/").rpartition("/")[2] or str(place)
