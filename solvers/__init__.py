"""Pure problem -> answer functions; nothing here knows torch. `warm.py` has all of them compiled before a clock runs."""
