"""Schedule -> something that runs or is read."""
