"""The database that workers share: SQLite for one machine, PostgreSQL for several."""

import contextlib
import re
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from landscape.errors import LandscapeError, MissingExtraError

if TYPE_CHECKING:  # an extra
    from optuna.storages import RDBStorage


def open_storage(url: str, *, heartbeat: int = 20, grace: int = 60) -> "RDBStorage":
    """Open a database for Optuna's studies, and make its tables if it has none.

    Args:
        url: ``sqlite:///file`` or ``postgresql://user@host/database``.
        heartbeat: Whole seconds between the signs of life of a trial that is running.
        grace: Whole seconds without one after which a trial is given up, and run again by whoever notices.

    Raises:
        LandscapeError: The database cannot be used, or the extra ``tune`` is not installed.
    """
    try:
        import optuna
        from sqlalchemy.exc import ArgumentError, SQLAlchemyError
    except ImportError as error:
        raise MissingExtraError("Tuning (Optuna)", "tune") from error
    address = re.sub("^postgres(ql)?://", "postgresql+psycopg://", url)
    for attempt in (1, 2, 3):
        try:
            with quiet():
                storage = optuna.storages.RDBStorage(
                    address, {"pool_pre_ping": True}, heartbeat_interval=heartbeat, grace_period=grace
                )
            return _with_turns(storage)
        except ArgumentError as error:
            raise LandscapeError(
                f"{url!r} is no address of a database; give one such as sqlite:///tuning.sqlite3 or "
                "postgresql://user@host/database."
            ) from error
        except ImportError as error:
            raise MissingExtraError("The driver of this database", "tune") from error
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if attempt == 3:
                raise LandscapeError(f"The database cannot be used: {str(error).splitlines()[0]}") from error
            time.sleep(0.5)  # workers that make the tables at the same time are in each other's way
    raise AssertionError


def _with_turns(storage: "RDBStorage") -> "RDBStorage":
    """Let transactions on SQLite begin with the right to write: two workers may else both take what waits for one."""
    from sqlalchemy import event

    if storage.engine.dialect.name == "sqlite":
        event.listen(storage.engine, "connect", _leave_begin_to_us)
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        storage.engine.dispose()  # of the connections made until now
    return storage


def _leave_begin_to_us(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout = 60000")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without Optuna's own lines, and its warnings that heartbeats may change one day."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
