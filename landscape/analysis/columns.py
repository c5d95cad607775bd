"""Columns of any frame, in the types that the analysis needs: after CSV, SQL, polars, merges and concatenations."""

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from landscape.errors import LandscapeError
from landscape.names import MEASURES

LISTS = (
    *("step_sizes", "losses", "gradient_distances", "gradient_cosines"),
    *("critical_step_sizes", "critical_losses"),
)
"""Columns with a list in each row."""
NUMBERS = (
    *("step", "epoch", "lr", "loss", "grad_norm", "slope", "direction_norm", "gradient_rest", "seconds"),
    *(f"{measure}{end}" for measure in MEASURES if measure != "loss" for end in ("", "_min", "_max")),
    *("loss_min", "loss_max"),
)
"""Columns with a number in each row."""
_WRAPPED = re.compile(r"(?:np\.|numpy\.)?(?:float\d+|array|tensor)\(|dtype=[\w.]+|\)")
"""What NumPy and torch write around numbers."""


def normalized(frame: pd.DataFrame, required: Iterable[str] = ()) -> pd.DataFrame:
    """Return the frame with a trace's columns in usual types.

    Numbers become ``int64`` or ``float64``, also from text, decimals, and types of pandas or Arrow with missing values.
    Lists become float64 arrays, also from lists, tuples, tensors, Arrow lists, and text such as ``"[0.1, 0.2]"`` or
    ``"[0.1 0.2]"``, as CSV files hold them. Missing lists become None. Other columns are not changed, and a frame that
    has these types is returned as it is.

    Args:
        frame: Any frame with columns of ``read_traces``.
        required: Names of columns that it must have.

    Raises:
        LandscapeError: A required column is missing, a column is there twice, or a value is no number or no list.

    Examples:
        >>> frame = normalized(pd.DataFrame({"loss": ["1.5"], "losses": ["[1.0 nan]"], "note": ["mine"]}))
        >>> float(frame["loss"][0]), frame["losses"][0].tolist(), frame["note"][0]
        (1.5, [1.0, nan], 'mine')
    """
    _check_names(frame, required)
    if set(frame.index.names) & set(frame.columns):  # as after set_index(..., drop=False)
        frame = frame.reset_index(drop=True)
    columns = {str(name): pd.Series(frame[name]) for name in (*NUMBERS, *LISTS) if name in frame}
    changed = {name: numbers(columns[name]) for name in NUMBERS if name in columns and not _is_plain(columns[name])}
    changed |= {name: lists(columns[name]) for name in LISTS if name in columns and not _has_arrays(columns[name])}
    return frame.assign(**changed) if changed else frame


def _check_names(frame: pd.DataFrame, required: Iterable[str]) -> None:
    if not isinstance(frame, pd.DataFrame):
        raise LandscapeError(
            f"frame has type {type(frame).__name__}: must be a pandas DataFrame. Convert it, for example with "
            "frame.to_pandas() (polars) or relation.df() (DuckDB)."
        )
    used = {*NUMBERS, *LISTS, *required, "run", "norm", "groups", "seed"}
    if twice := [str(name) for name in frame.columns[frame.columns.duplicated()].unique() if name in used]:
        raise LandscapeError(
            f"columns={', '.join(twice)}: each is in the frame twice. Use "
            "frame.loc[:, ~frame.columns.duplicated()], or rename one."
        )
    if missing := [name for name in required if name not in frame]:
        in_index = [name for name in missing if name in frame.index.names]
        remedy = "Use frame.reset_index()" if in_index else "Use the frame of read_traces or LandscapeProbe.frame"
        raise LandscapeError(
            f"columns={', '.join(missing)}: not in the frame. {remedy}, or keep them; its columns are "
            f"{', '.join(map(str, frame.columns))}."
        )


def _is_plain(column: pd.Series) -> bool:
    return isinstance(column.dtype, np.dtype) and column.dtype.kind in "iuf"


def _has_arrays(column: pd.Series) -> bool:
    return column.dtype == object and set(map(type, column.to_numpy())) <= {np.ndarray, type(None)}


def numbers(column: pd.Series) -> pd.Series:
    """Return a column as int64 or float64.

    Raises:
        LandscapeError: A value is no number; the message names column and row.

    Examples:
        >>> numbers(pd.Series([1, None], dtype="Int64")).tolist()
        [1.0, nan]
    """
    if isinstance(column.dtype, np.dtype | pd.CategoricalDtype) or pd.api.types.is_string_dtype(column.dtype):
        values = column.astype(object)
    else:
        values = column
    if values.dtype == object:
        given = [None if _is_missing(value) else value for value in values]
        return pd.Series([_number(value, column, row) for row, value in enumerate(given)], column.index, float)
    if pd.api.types.is_datetime64_any_dtype(values.dtype) or not pd.api.types.is_numeric_dtype(values.dtype):
        raise _refusal(column, 0, values.iloc[0] if len(values) else values.dtype, "a number")
    if values.isna().any() or not pd.api.types.is_integer_dtype(values.dtype):
        return pd.Series(values.to_numpy(float, na_value=np.nan), column.index)
    return pd.Series(values.to_numpy("int64"), column.index)


def _number(value: Any, column: pd.Series, row: int) -> float:
    try:
        return np.nan if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise _refusal(column, row, value, "a number") from error


def lists(column: pd.Series) -> pd.Series:
    """Return a column of lists as float64 arrays, or None.

    Raises:
        LandscapeError: A value is no list of numbers; the message names column and row.

    Examples:
        >>> [values.tolist() for values in lists(pd.Series(["[np.float64(0.5), inf]", (1, None)]))]
        [[0.5, inf], [1.0, nan]]
    """
    arrays = np.empty(len(column), dtype=object)  # Otherwise pandas makes a table of lists of equal length.
    for row, value in enumerate(column.astype(object)):
        arrays[row] = None if _is_missing(value) else _array(value, column, row)
    return pd.Series(arrays, column.index, dtype=object)


def _array(value: Any, column: pd.Series, row: int) -> np.ndarray:
    try:
        if isinstance(value, str):
            return _parsed(value)
        filled = value.filled(np.nan) if isinstance(value, np.ma.MaskedArray) else value
        array = np.asarray(filled.tolist() if hasattr(filled, "tolist") else list(filled), float)
    except (TypeError, ValueError) as error:
        raise _refusal(column, row, value, "a list of numbers") from error
    if array.ndim != 1:
        raise _refusal(column, row, value, "a list of numbers")
    return array


def _parsed(text: str) -> np.ndarray:
    """Return the numbers of a written list.

    NumPy abridges long arrays by dots, which are no number.
    """
    inner = _WRAPPED.sub(" ", text).strip(" ,")
    if not (inner.startswith("[") and inner.endswith("]")):
        raise ValueError(text)
    words = re.sub(r"\b(?:NULL|None|null)\b", "nan", inner[1:-1]).replace(",", " ").split()
    return np.array([float(word) for word in words])


def _is_missing(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "nan", "none", "null", "<na>")
    return value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value))


def _refusal(column: pd.Series, row: int, value: Any, kind: str) -> LandscapeError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:59]}…"
    return LandscapeError(
        f"column {column.name}, row {row}: {shown} must be {kind}. Use the column as read_traces gives "
        "it; Parquet, Feather and pickle keep it."
    )
