"""``python -m landscape_cli``: the command as a module, for torchrun."""

import json
import os
import sys
import time
import traceback
from pathlib import Path

import click

from .main import main


def run() -> None:
    """Run the command, alone or as a process of torchrun."""
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not error_file:
        main(prog_name="landscape")
    code = _run_rank(Path(str(error_file)))
    sys.stdout.flush()
    sys.stderr.flush()
    # Exit without cleanup: torch 2.13 may abort an interpreter in which an object still holds a process group.
    os._exit(code)


def _run_rank(error_file: Path) -> int:
    """Run the command; return its exit code.

    A usage error is the same in every process, so it is written to a file, from which torchrun reads it once.
    """
    try:
        main(prog_name="landscape", standalone_mode=False)
    except click.ClickException as error:
        error_file.write_text(json.dumps({"message": error.format_message(), "timestamp": int(time.time())}))
        return error.exit_code
    except click.Abort:
        return 1
    except SystemExit as error:
        return int(error.code or 0)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    run()
