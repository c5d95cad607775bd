"""Recorded runs compared with the recipes that are to be trained."""

import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from landscape.errors import LandscapeError
from landscape.storage.filesystem import Location, store_at
from landscape.traces.folder import TraceFolder
from landscape.traces.metadata import plain
from landscape.traces.reader import read_traces
from landscape.traces.schema import TABLES
from landscape.training.recipe import Recipe

_RENAMED = {"probe_lrs": "step_sizes"}
"""Settings by their names in earlier versions."""


def is_recorded(recipe: Recipe, location: Location) -> bool:
    """Return True if the recipe's run is recorded completely.

    Args:
        recipe: Recipe of the run.
        location: Folder or URL of the run.

    Raises:
        LandscapeError: A run with other settings is recorded there, or it is damaged.
    """
    store = store_at(location)
    folder = TraceFolder(store, store.names())  # Listed once, which is a request on an object store.
    if not folder.has_rows:
        return False
    recorded = folder.metadata()
    if "norm" not in recorded:
        raise LandscapeError(f"{location}: its run.json holds no recipe, so it is another run. Use another folder.")
    # The recorded engine may be another than the requested one, such as that chosen by "auto".
    check_same(recipe.resolve(), recorded, location, but=["engine"])
    if folder.has_checkpoint or not all(folder.parts(table) for table in TABLES):
        return False
    with warnings.catch_warnings(action="ignore"):  # Unreadable parts raise an error below.
        frames = {table: read_traces(location, table) for table in TABLES}
    # A damaged run is neither unfinished, which would replace it, nor complete.
    if left_out := [sentence for frame in frames.values() for sentence in frame.attrs["left_out"]]:
        damage = "; ".join(dict.fromkeys(left_out))
        raise LandscapeError(f"{location}: damaged: {damage}. Repair it, move it away, or replace it (--overwrite).")
    return recipe.epochs in set(frames["epochs"]["epoch"])


def pending(runs: Sequence[Recipe], folder: Path) -> list[Recipe]:
    """Return the runs not recorded completely in a folder.

    Args:
        runs: Recipes of the runs.
        folder: Folder of traces, with a subfolder for each run.

    Raises:
        LandscapeError: A run was recorded with other settings, or is damaged.

    Examples:
        >>> from landscape import RECIPES
        >>> [recipe.run_name for recipe in pending([RECIPES["digits"]], Path("traces"))]
        ['digits-batch-seed0']
    """
    return [run for run in runs if not is_recorded(run, folder / run.run_name)]


def check_same(recipe: Recipe, recorded: Mapping[str, Any], location: Location, but: Collection[str] = ()) -> None:
    """Raise a LandscapeError if a recorded run has other settings.

    Args:
        recipe: Recipe, resolved.
        recorded: Metadata of the recorded run. Earlier versions had fewer settings; missing ones are not compared.
        location: Folder or URL of the run, for the message.
        but: Settings that may differ.
    """
    recorded = {_RENAMED.get(name, name): value for name, value in recorded.items()}
    for name, value in plain(recipe.metadata()).items():
        if name not in but and recorded.get(name, value) != value:
            raise LandscapeError(
                f"{name}={value}: must be {recorded[name]}, the value recorded in {location}. Use the recorded value, "
                "or another folder."
            )


def check_same_data(facts: Mapping[str, Any], location: Location) -> None:
    """Raise a LandscapeError if a recorded run has other data.

    Args:
        facts: Metadata of the run that is to be resumed; only data of a user have a hash.
        location: Folder or URL of the run.
    """
    folder = TraceFolder(location)
    if "data_sha256" not in facts or not folder.has_rows:
        return
    if folder.metadata().get("data_sha256", facts["data_sha256"]) != facts["data_sha256"]:
        raise LandscapeError(
            f"{facts['dataset']}: has other samples than those recorded in {location}. Restore them, or use another "
            "folder (--out)."
        )
