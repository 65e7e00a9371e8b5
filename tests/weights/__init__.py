"""Weights in other kinds of files than torch's zip: safetensors, shards, legacy files; see docs/weight-files.md."""
