"""Speed against the named alternatives, measured in one run: ``python -m benchmarks.rays``, ``python -m benchmarks.norms``."""
