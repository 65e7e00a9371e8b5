"""What only saving needs."""
