"""Benchmarks of statedict_io against everything a user could save with instead; see benchmarks/README.md."""
