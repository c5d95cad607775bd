"""Processes started by tests."""

import signal
import subprocess
import sys

PATIENCE = 600
"""Seconds after which a process counts as hanging, long enough for a busy machine."""


def start(words, **options):
    """Start a process that receives SIGINT, even if this one ignores it, and return it with its pipes.

    A shell starts background jobs with SIGINT ignored, and their child processes inherit that. A signal with a handler,
    however, is reset to its default when a program is started.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(words, **pipes, **options)
    finally:
        signal.signal(signal.SIGINT, previous)


def landscape(*arguments, **options):
    """Start the command ``landscape`` in a process."""
    return start([sys.executable, "-W", "error::UserWarning", "-m", "landscape_cli", *arguments], **options)
