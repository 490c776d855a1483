"""The commands: each parses its own options, calls the API, and prints."""
