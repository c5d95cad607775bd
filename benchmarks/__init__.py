"""Speed against the named alternatives, each in one run: ``python -m benchmarks.rays`` and ``benchmarks.norms``."""
