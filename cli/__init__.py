"""The ``landscape`` command."""
