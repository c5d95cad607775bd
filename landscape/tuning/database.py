"""Database that tuning workers share: SQLite for one machine, PostgreSQL for several."""

import contextlib
import re
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from landscape.errors import LandscapeError, MissingExtraError
from landscape.storage.address import local_path
from landscape.text import without_secrets

if TYPE_CHECKING:  # Optuna is an optional dependency.
    from optuna.storages import RDBStorage


def open_storage(url: str, *, heartbeat: int = 20, grace: int = 60) -> "RDBStorage":
    """Open a database for Optuna studies, creating missing tables.

    Args:
        url: ``sqlite:///file`` or ``postgresql://user@host/database``.
        heartbeat: Seconds between two heartbeats of a running trial, a whole number.
        grace: Seconds without a heartbeat after which a trial is marked as failed and run again, a whole number.

    Raises:
        LandscapeError: The URL is invalid, the database cannot be used, or the extra ``tune`` is not installed.

    Examples:
        >>> storage = open_storage("sqlite:///tuning.sqlite3")
        >>> storage.get_all_studies()
        []
        >>> storage.engine.dispose()
    """
    try:
        import optuna
        from sqlalchemy.exc import ArgumentError, SQLAlchemyError
    except ImportError as error:
        raise MissingExtraError("Tuning (Optuna)", "tune") from error
    if not url.startswith("sqlite") and url.count("@") > 1:  # A driver would print what follows the first one.
        raise LandscapeError(f"storage={without_secrets(url)!r}: @ in a password must be written as %40.")
    for attempt in (1, 2, 3):
        try:
            with quiet():
                storage = optuna.storages.RDBStorage(
                    _address(url), {"pool_pre_ping": True}, heartbeat_interval=heartbeat, grace_period=grace
                )
            return _serialize_transactions(storage)
        except ArgumentError as error:
            raise LandscapeError(
                f"storage={without_secrets(url)!r}: must be the URL of a database. Use sqlite:///tuning.sqlite3 or "
                "postgresql://user@host/database."
            ) from error
        except ImportError as error:
            raise MissingExtraError(f"storage={without_secrets(url)!r}", "tune") from error
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            if attempt == 3:
                raise LandscapeError(
                    f"storage={without_secrets(url)!r}: cannot be used: {without_secrets(str(error).splitlines()[0])}. "
                    "Use a file on a local disk, since network disks may lack locks, or PostgreSQL."
                ) from error
            time.sleep(0.5)  # Creating the tables fails if another worker creates them at the same time.
    raise AssertionError


def _address(url: str) -> str:
    """Return the URL with its driver, and without ``~``.

    Raises:
        LandscapeError: The database is in memory.
    """
    from sqlalchemy import make_url

    address = make_url(re.sub("^postgres(ql)?://", "postgresql+psycopg://", url))
    if address.get_backend_name() == "sqlite":
        path = address.database or ":memory:"
        if ":memory:" in path or "mode=memory" in url:
            raise LandscapeError(
                f"storage={url!r}: is in memory, where other workers cannot share it. Use a file, such as "
                "sqlite:///tuning.sqlite3."
            )
        if path.startswith("~"):
            address = address.set(database=str(local_path(path, "storage")))
    return address.render_as_string(hide_password=False)


def _serialize_transactions(storage: "RDBStorage") -> "RDBStorage":
    """Start every SQLite transaction with the write lock.

    By default SQLite takes the lock at the first write of a transaction. Two workers could then both read that a trial
    is waiting, and both run it.
    """
    from sqlalchemy import event

    if storage.engine.dialect.name == "sqlite":
        event.listen(storage.engine, "connect", _disable_implicit_begin)
        event.listen(storage.engine, "begin", lambda connection: connection.exec_driver_sql("BEGIN IMMEDIATE"))
        storage.engine.dispose()  # Connections that were opened before lack these listeners.
    return storage


def _disable_implicit_begin(connection: Any, _record: Any) -> None:
    connection.isolation_level = None
    connection.execute("PRAGMA busy_timeout = 60000")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress Optuna's log, and its warnings about experimental heartbeats."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
