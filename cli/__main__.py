"""``python -m landscape_cli``: the command as a module, which is how torchrun starts it."""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import click

from .main import main


def run() -> None:
    """The command; under torchrun as one of several processes that do the same."""
    told = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not told:
        main(prog_name="landscape")
    code = _one_of_many(Path(str(told)))
    sys.stdout.flush()
    sys.stderr.flush()
    # At once: torch (2.13) may abort an interpreter that ends while something still holds a process group.
    os._exit(code)


def _one_of_many(told: Path) -> int:
    """The exit code; a mistake goes into the file that torchrun reads, because every process makes the same."""
    try:
        main(prog_name="landscape", standalone_mode=False)
    except click.ClickException as mistake:
        told.write_text(json.dumps({"message": mistake.format_message(), "timestamp": int(time.time())}))
        return mistake.exit_code
    except click.Abort:
        return 1
    except SystemExit as stopped:
        return int(stopped.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    run()
