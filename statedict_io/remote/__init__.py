"""URLs as places to save to and to read from, through fsspec: ``s3://``, ``gs://``, ``memory://`` (docs/remote.md)."""
