"""The release. A wheel for one torch adds that to it (``0.1.0+torch2.13``), in its metadata alone."""

VERSION = "0.1.0"
