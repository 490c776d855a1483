"""The command line: one file a command, beside what commands share (`options`, `asked`, `tables`, `terminal`, `progress`).

Comes in: words. Goes out: text or JSON on standard output, an exit status.
Begins at `app.py`. Nothing imports it.
"""
