"""URLs: memory:// for what any store shows, an S3 server on loopback for the protocol and its faults."""
