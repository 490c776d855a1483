"""What is measured, and against what. Each module is a command: `python -m memplan.benchmarks.cpu`; see README.md."""
