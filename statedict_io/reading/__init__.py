"""Reading: load, verify, and the records of an open archive by name."""
