"""What a file that nobody vouches for may make us do and show: limits on work, memory and output; text made safe."""
