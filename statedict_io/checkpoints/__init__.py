"""Directories of checkpoints: what is kept there, what goes, which one is the newest that is sound."""
