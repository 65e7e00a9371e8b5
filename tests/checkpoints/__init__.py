"""CheckpointDirectory: what is kept, what is found, and what a kill, a bad disk or a second writer can do to it."""
