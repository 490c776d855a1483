"""A scratchpad machine that runs a mapping on exactly so many bytes."""
