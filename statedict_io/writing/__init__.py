"""Saving: the calls, what they save to, how a file gets there whole, and saves that are still in flight."""
