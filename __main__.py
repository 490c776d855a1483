"""`python -m memplan`: the command line."""

from memplan.planner.cli import main

if __name__ == "__main__":
    main()
