"""Engines: the ways to evaluate a ray, one in each file."""
