"""The torch that is there: its own functions, the format that it writes, and the proofs that it works as is expected
here."""
