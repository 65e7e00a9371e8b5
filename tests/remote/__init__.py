"""URLs: memory:// for what any store shows, moto's S3 server on loopback for the protocol and its faults."""
