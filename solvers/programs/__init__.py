"""Exact programs: what every room states its integer and constraint programs through."""
