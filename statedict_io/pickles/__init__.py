"""The stream data.pkl: made from objects, followed without running it, made objects again by torch's unpickler."""
