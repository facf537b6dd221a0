"""Benchmarks: the project's own, and loaders of published ones in their original layouts."""
