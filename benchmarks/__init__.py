"""Benchmarks: run from the repository root, ``python -m benchmarks.<name>``. They print tables, and JSON with ``--json``."""
