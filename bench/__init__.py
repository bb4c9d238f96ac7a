"""Benchmarks: `python -m bench decode | gather | plot` (see bench/README.md)."""
