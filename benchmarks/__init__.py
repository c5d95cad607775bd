"""Benchmarks of speed and memory against named alternatives, such as ``python -m benchmarks.rays``."""
