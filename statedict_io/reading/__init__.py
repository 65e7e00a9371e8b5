"""Reading checkpoints, a module each step."""
