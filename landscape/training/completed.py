"""Whether a recipe's run is recorded, and is that run and no other."""

import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Location, store_at
from landscape.traces.folder import CHECKPOINT, has_rows, part_names, read_facts
from landscape.traces.metadata import plain
from landscape.traces.reader import read_traces
from landscape.traces.schema import TABLES
from landscape.training.recipe import Recipe


def is_recorded(recipe: Recipe, place: Location) -> bool:
    """Whether the recipe's run is in the place to its end.

    Raises:
        LandscapeError: Another run is there, or what is there cannot be read.
    """
    if not has_rows(place):
        return False
    store = store_at(place)
    known = read_facts(store)
    if "norm" not in known:
        raise LandscapeError(f"{place} does not say what was recorded in it (run.json); give another folder.")
    # What was taken may be another engine than was asked for.
    check_same(recipe.resolve(), known, place, but=["engine"])
    names = store.names()
    if CHECKPOINT in names or not all(part_names(names, table) for table in TABLES):
        return False
    with warnings.catch_warnings(action="ignore"):  # it is an error here
        frames = {table: read_traces(place, table) for table in TABLES}
    # A damaged run is not to be taken for an unfinished one, and replaced, nor for a whole one.
    if left_out := [sentence for frame in frames.values() for sentence in frame.attrs["left_out"]]:
        told = "; ".join(dict.fromkeys(left_out))
        raise LandscapeError(f"{place} is damaged: {told}. Mend it, move it out, or start it anew (--overwrite).")
    return recipe.epochs in set(frames["epochs"]["epoch"])


def check_same(recipe: Recipe, known: Mapping[str, Any], place: Location, but: Collection[str] = ()) -> None:
    """Raise a LandscapeError unless the settings of a recorded run are those of the recipe.

    Args:
        recipe: What is asked for, checked.
        known: What was recorded, by the names of the recipe's options; earlier versions had fewer.
        place: Where it was recorded.
        but: Options that may differ.
    """
    for name, asked in plain(asdict(recipe)).items():
        if name not in but and known.get(name, asked) != asked:
            found = f"{name}={known[name]}, and asked for is {name}={asked}"
            raise LandscapeError(f"{place} was recorded with {found}; give another folder.")
